"""Systems of section 2.2.2.3 that match units by activations or move them by transport, on real digits."""

from __future__ import annotations

from matching_lab import accuracy, trained, unlabelled

import weft
from weft.align.cca import cca_merge
from weft.align.correlate import activation_matching, neuron_alignment
from weft.align.transport import ot_fusion

A, B = trained(1, 48, 48), trained(2, 48, 48)
ENDS = (accuracy(A, A), accuracy(B, B))
NAIVE = accuracy(weft.merge([A, B], "linear"), A)


def test_independent_networks_cannot_be_averaged() -> None:
    assert min(ENDS) > 0.92
    assert min(ENDS) - 0.1 > NAIVE


def test_activation_matching_lets_independent_networks_be_averaged() -> None:
    found = activation_matching(B, A, unlabelled())
    assert accuracy(found.checkpoint, A) == ENDS[1]
    assert accuracy(found.merged(), A) > min(ENDS) - 0.06 > NAIVE


def test_neuron_alignment_lets_independent_networks_be_averaged() -> None:
    found = neuron_alignment(B, A, unlabelled())
    assert accuracy(found.checkpoint, A) == ENDS[1]
    assert accuracy(found.merged(), A) > min(ENDS) - 0.06 > NAIVE


def test_cca_mixes_units_and_merges_better_than_the_plain_mean() -> None:
    found = cca_merge(B, A, unlabelled())
    assert found.transport and not any(m.hard for m in found.transport.values())
    assert accuracy(found.merged(), A) > min(ENDS) - 0.05 > NAIVE


def test_optimal_transport_fuses_networks_of_equal_and_unequal_widths() -> None:
    for found in (ot_fusion(B, A), ot_fusion(B, A, unlabelled(), by="activations")):
        assert all(m.hard for m in found.transport.values())
        assert accuracy(found.merged(), A) > NAIVE + 0.08
    wide = trained(3, 72, 60)
    found = ot_fusion(wide, A, unlabelled(), by="activations")
    assert {n: i.shape for n, i in found.checkpoint.tensors.items()} == {
        n: tuple(t.shape) for n, t in A.state_dict().items()
    }
    assert accuracy(found.checkpoint, A) > 0.8
    assert accuracy(found.merged(), A) > NAIVE + 0.08
    soft = ot_fusion(B, A, unlabelled(), by="activations", reg=0.01)
    assert not any(m.hard for m in soft.transport.values())
    assert accuracy(soft.merged(), A) > NAIVE + 0.08
