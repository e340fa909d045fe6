"""Systems of section 2.2.2.3 that match units by activations or move them by transport, on real digits."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

import torch
from matching_lab import accuracy, digits, fitted, mlp, only, reader, trained, unlabelled
from torch import nn

import weft
from weft.align.cca import cca_merge
from weft.align.correlate import activation_matching, neuron_alignment
from weft.align.mudsc import mudsc
from weft.align.transport import ot_fusion, transformer_fusion
from weft.align.zipping import zip_models

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


def test_transformers_fuse_by_soft_transport() -> None:
    a, b, wide = reader(1), reader(2), reader(3, 32, 48)
    naive = weft.merge([a, b], "linear")

    def tuned(model: object) -> float:
        start = weft.materialize(model, deepcopy(a))  # type: ignore[arg-type]
        return accuracy(fitted(start, 0, epochs=1, rate=2e-3), a)

    exact = transformer_fusion(b, a, unlabelled(), reg=None)
    assert accuracy(exact.checkpoint, a) == accuracy(
        b, b
    )  # heads stay whole, one order all along the residual stream
    soft = transformer_fusion(b, a, unlabelled())
    assert accuracy(soft.merged(), a) > accuracy(naive, a) + 0.1
    assert tuned(soft.merged()) > tuned(naive) + 0.05
    assert tuned(transformer_fusion(wide, a, unlabelled()).merged()) > tuned(naive) + 0.05


def test_weights_and_activations_together_match_better_than_activations_alone() -> None:
    data = unlabelled()
    alone = mudsc(B, A, data, weight=0)
    same = neuron_alignment(B, A, data)
    assert all(torch.equal(p, same.permutations[g]) for g, p in alone.permutations.items())
    assert accuracy(mudsc(B, A, data).checkpoint, A) == ENDS[1]
    gains = []
    for seed in (1, 3, 5):
        a, b = trained(seed, 48, 48), trained(seed + 1, 48, 48)
        both, acts = (accuracy(mudsc(b, a, data, weight=w).merged(), a) for w in (0.5, 0))
        assert both > accuracy(weft.merge([a, b], "linear"), a) + 0.08
        gains.append(both - acts)
    assert min(gains) > 0 and sum(gains) > 0.02
    # zips of networks that know other digits gain far more
    gains = [
        both_halves(*halves(seed), weight=0.5) - both_halves(*halves(seed), weight=0) for seed in (21, 23, 25)
    ]
    assert min(gains) > 0 and sum(gains) > 0.3


@lru_cache
def halves(first: int = 21) -> tuple[nn.Module, nn.Module]:
    """Two networks of their own starts: one knows the digits 0 … 4, the other 5 … 9."""
    made = []
    for seed, classes in ((first, range(5)), (first + 1, range(5, 10))):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made.append(fitted(mlp(48, 48, 48), seed, only(digits()[0], list(classes))))
    return made[0], made[1]


def both_halves(a: nn.Module, b: nn.Module, weight: float) -> float:
    """Mean accuracy of a zipped trunk over the two tasks, each with its own classifier."""
    made = zip_models([a, b], unlabelled(), private="6.*", weight=weight).checkpoints
    every = zip(made, (range(5), range(5, 10)), strict=True)
    return sum(accuracy(m, a, only(digits()[1], list(c)), c) for m, c in every) / 2


def test_zips_of_networks_with_disjoint_labels_beat_plain_and_permuted_means() -> None:
    a, b = halves()
    test, data = digits()[1], unlabelled()

    def both(first: object, second: object) -> float:
        """Mean accuracy over the two tasks, each with its own classifier."""
        every = (first, range(5)), (second, range(5, 10))
        return sum(accuracy(m, a, only(test, list(c)), c) for m, c in every) / 2

    def mean(like: object) -> float:
        """Of the mean with a model in some order, classifiers apart."""
        x, y = weft.load(a).state_dict(), weft.load(like).state_dict()  # type: ignore[arg-type]
        trunk = {n: (t + y[n]) / 2 for n, t in x.items() if not n.startswith("6.")}
        return both(*({**trunk, "6.weight": s["6.weight"], "6.bias": s["6.bias"]} for s in (x, y)))

    ends = both(a, b)
    plain, permuted = mean(b), mean(neuron_alignment(b, a, data).checkpoint)
    full = both(*zip_models([a, b], data, private="6.*").checkpoints)
    partial = both(*zip_models([a, b], data, private=["4.*", "6.*"]).checkpoints)
    assert ends > 0.94 and plain < 0.5
    assert full > permuted + 0.15 > plain + 0.15
    assert partial > full
    assert zip_models([a, b], data, private="6.*").checkpoints[0].info("0.weight").shape == (48, 64)
