"""CAT Merging where the answer is known: what is trimmed, of maps, scales and shifts, and what is not."""

from __future__ import annotations

import torch
from torch import nn

import weft
from weft.methods.cat import cat, trim_conflicts
from weft.methods.gram import fit_inputs
from weft.methods.step import At

N = 6


def energies(*rows: int) -> torch.Tensor:
    """Inputs of unit variance in some features only."""
    return torch.diag(torch.tensor([float(i in rows) for i in range(N)], dtype=torch.float64))


def test_what_only_the_other_task_sees_is_trimmed() -> None:
    """τ₁ writes into output 0 from the other task's feature, and into output 1 from its own."""
    grams = torch.stack([energies(0, 1), energies(4, 5)])
    t = torch.zeros(2, 3, N, dtype=torch.float64)
    t[0, 0, 4], t[0, 1, 0], t[1, 2, 5] = 1.0, 2.0, 3.0
    trimmed = trim_conflicts(t, at=At("layers.0.w", (3, N)), statistics={"gram": grams})
    want = t.clone()
    want[0, 0, 4] = 0
    torch.testing.assert_close(trimmed, want)
    merged = cat(t, statistics={"gram": grams}, weight=[2.0, 1.0])
    torch.testing.assert_close(merged, 2 * want[0] + want[1])
    # one direction at most is trimmed of each; without any this is task arithmetic
    torch.testing.assert_close(cat(t, statistics={"gram": grams}, directions=0), t.sum(0))
    # an expert without a weight is no task that could be disturbed
    torch.testing.assert_close(cat(t, statistics={"gram": grams}, weight=[1.0, 0.0]), t[0])
    turned = cat(t.mT.contiguous(), statistics={"gram": grams}, at=At("w", (N, 3), transposed=True))
    torch.testing.assert_close(turned, want.sum(0).T)


def test_a_direction_that_its_own_task_uses_more_stays() -> None:
    grams = torch.stack([energies(0), energies(0, 1)])
    t = torch.zeros(2, 2, N, dtype=torch.float64)
    t[0, 0, 0] = t[0, 0, 1] = 1.0  # moves the other's output by 2, its own by 1
    for own, kept in ((5.0, 1.0), (1.0, 0.0)):
        found = cat(t, statistics={"gram": grams}, own=own)
        torch.testing.assert_close(found, t[0] * kept)


def test_scales_by_inputs_and_shifts_by_size() -> None:
    seen = torch.tensor([[1.0, 9.0, 1.0, 9.0], [1.0, 1.0, 9.0, 0.0]], dtype=torch.float64)
    t = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    at = At("layers.0.norm.weight", (4,))
    scale = trim_conflicts(t, at=at, statistics={"gram": seen}, entries=0.25, own=1.0)
    assert scale.tolist() == [[1, 1, 0, 1], [1, 1, 1, 0]]
    shift = trim_conflicts(t, at=at, statistics={"gram": None}, entries=0.25)
    assert shift.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0]] and torch.equal(t[0], torch.ones(4).double())
    assert torch.equal(trim_conflicts(t, at=at, statistics={"gram": seen}, entries=0.0), t)


def test_nothing_is_trimmed_where_no_input_was_seen() -> None:
    t = torch.randn(3, 4, N, dtype=torch.float64)
    empty = torch.zeros(3, N, N, dtype=torch.float64)
    torch.testing.assert_close(cat(t, statistics={"gram": empty}), t.sum(0))
    torch.testing.assert_close(cat(t, statistics={"gram": None}), t.sum(0))
    torch.testing.assert_close(cat(0 * t, statistics={"gram": empty + torch.eye(N).double()}), 0 * t[0])


def test_experts_and_their_blocks_one_by_one() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, 16, generator=g, dtype=torch.float64)
    seen = torch.randn(3, 2, 5, 16, generator=g, dtype=torch.float64)
    grams = seen.mT @ seen
    found = cat(x, statistics={"gram": grams}, own=0.5)
    for e in range(2):
        torch.testing.assert_close(found[e], cat(x[:, e], statistics={"gram": grams[:, e]}, own=0.5))
    # more outputs than inputs: the same, in the span of the columns
    tall = torch.randn(3, 40, 16, generator=g, dtype=torch.float64)
    wide = torch.cat([tall, torch.zeros(3, 40, 40).double()], 2)
    padded = torch.zeros(3, 56, 56, dtype=torch.float64)
    padded[:, :16, :16] = grams[:, 0]
    torch.testing.assert_close(
        cat(tall, statistics={"gram": grams[:, 0]}, own=0.5),
        cat(wide, statistics={"gram": padded}, own=0.5)[:, :16],
    )


def test_a_step_before_regmean_and_a_merge_of_checkpoints() -> None:
    """RegMean-CAT; a table and a bias beside it."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 5)) for _ in range(3)]
    base, *tuned = nets
    known = [weft.measure(m, [torch.randint(9, (60, 4))], "gram") for m in tuned]
    merged = weft.merge(tuned, "cat", base=base, statistics=known, scale=0.5)
    table = [m.state_dict()["0.weight"].double() for m in nets]
    torch.testing.assert_close(
        merged.tensor("0.weight"), table[0] + 0.5 * (table[1] + table[2] - 2 * table[0])
    )
    assert merged.grain("0.weight") == 1 and any("no gram measured" in n for n in merged.notes)
    both = weft.methods.registry.pipeline_method(trim_conflicts(own=0.5) | fit_inputs(off_diagonal=0.9))
    fitted = weft.merge(tuned, both, base=base, statistics=known)
    x = torch.stack(
        [m.state_dict()["2.weight"].double() - base.state_dict()["2.weight"].double() for m in tuned]
    )
    given = {"gram": torch.stack([s.tensor("gram/2.weight").double() for s in known])}
    want = fit_inputs(trim_conflicts(x, own=0.5, at=At("2.weight", (5, 6)), statistics=given), statistics=given,
                      off_diagonal=0.9)  # fmt: skip
    torch.testing.assert_close(
        fitted.tensor("2.weight"), want + base.state_dict()["2.weight"].double(), rtol=1e-6, atol=1e-7
    )
