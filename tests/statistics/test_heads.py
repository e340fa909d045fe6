"""Merges by data of experts with different heads, of inputs that are no numbers, of more tasks than rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from weft.errors import DataError, DataProblems


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, classes))


def test_heads_of_different_sizes_are_an_error_or_carried() -> None:
    torch.manual_seed(0)
    nets, data = [network(4), network(5)], [torch.randn(30, 8) for _ in range(2)]
    known = [weft.measure(m, [x], "gram") for m, x in zip(nets, data, strict=True)]
    with pytest.raises(DataProblems, match=r"2\.weight: shapes differ: \[4, 16\] in .*, \[5, 16\]"):
        weft.merge(nets, "regmean", statistics=known)
    merged = weft.merge(nets, "regmean", statistics=known, mismatch="carry")
    assert merged.carried == {"2.weight": "shapes differ", "2.bias": "shapes differ"}
    assert torch.equal(merged.tensor("2.weight"), nets[0][2].weight.detach())
    assert bool(merged.tensor("0.weight").isfinite().all())
    for verb in (weft.regmean_pp, weft.iteris):
        with pytest.raises(DataProblems, match=r"2\.weight: shapes differ"):
            verb(nets, [[x] for x in data])  # type: ignore[operator]


def test_inputs_that_are_not_numbers_stop_every_merge_that_measures() -> None:
    torch.manual_seed(0)
    nets, bad = [network(4), network(4)], [[torch.full((9, 8), torch.nan)], [torch.ones(9, 8)]]
    for verb in (weft.regmean_pp, weft.iteris):
        with pytest.raises(DataError, match=r"inputs of the layer with '0\.weight' have NaN"):
            verb(nets, bad)  # type: ignore[operator]


@pytest.mark.parametrize("method", ["regmean", "lot", "gram", "cat", "esm"])
def test_twenty_tasks_on_matrices_of_rank_four_with_two_examples_each(method: str) -> None:
    torch.manual_seed(0)
    base = network(4)
    nets = [network(4) for _ in range(20)]
    known = [weft.measure(m, [torch.randn(2, 8)], "gram") for m in nets]
    anchor = base if weft.METHODS[method].base == "required" else None
    merged = weft.merge(nets, method, base=anchor, statistics=known)
    largest = max(float(m.state_dict()[n].abs().max()) for m in (base, *nets) for n in m.state_dict())
    for name in merged:
        values = merged.tensor(name)
        assert bool(values.isfinite().all())
        assert float(values.abs().max()) < (40 if method in ("cat", "esm") else 2) * largest  # sums, or means
