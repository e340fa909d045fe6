"""Symmetries found by running a network: its function is unchanged, and nothing that could move is missed."""

from __future__ import annotations

import pytest
import torch
from networks import IMAGE, KINDS, made, mlp
from torch import Tensor, nn

from weft.align import discover, preserved
from weft.errors import DataError, UsageError


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_permutation_changes_nothing_that_the_network_computes(kind: str) -> None:
    net, inputs = made(kind), KINDS[kind].inputs
    spec = discover(net, inputs)
    assert spec.degrees == KINDS[kind].degrees, str(spec)
    assert max(preserved(net, spec, inputs, seed=s) for s in range(3)) < 1e-9
    assert not spec.notes


def test_what_was_found_is_needed_as_a_whole() -> None:
    """Units moved in one tensor alone do change the function: the check above can fail."""
    from weft.align import PermutationSpec

    net, inputs = made("mlp"), KINDS["mlp"].inputs
    spec = discover(net, inputs)
    axes = {n: tuple(None if (n, k) == ("2.weight", 1) else t for k, t in enumerate(row))
            for n, row in spec.axes.items()}  # fmt: skip
    assert preserved(net, PermutationSpec(spec.groups, axes), inputs) > 1e-2


def test_on_the_meta_device_nothing_is_computed_and_the_same_is_found() -> None:
    net = made("resnet")
    with torch.device("meta"):
        ghost = KINDS["resnet"].make().double()
    assert discover(ghost, IMAGE) == discover(net, IMAGE)


def test_the_module_is_left_as_it_was() -> None:
    net = made("resnet").train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    discover(net, IMAGE)
    assert all(m.training for m in net.modules())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_units_whose_order_is_told_stay_where_they_are() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).sort(-1).values) * self.a(x)[:, :1]  # type: ignore[no-any-return]

    assert discover(Sorted(), torch.randn(2, 4)).degrees == 0


def test_what_no_rule_is_known_for_is_left_alone_and_noted() -> None:
    spec = discover(nn.LSTM(4, 6), torch.randn(3, 2, 4))
    assert spec.degrees == 0 and "no rule is known" in spec.notes[0]


def test_a_network_that_cannot_be_run_says_why() -> None:
    with pytest.raises(
        DataError, match=r"cannot be run to find its symmetries \(in 0\): .*give example_inputs"
    ):
        discover(made("vgg"), torch.randn(2, 5))
    with pytest.raises(UsageError, match="give example_inputs for ResNet"):
        discover(made("resnet"))
    assert discover(mlp()).degrees == 16  # the width of a first linear layer is an input that can be guessed
