"""weft's own static merge: what its last step does to a spectrum, and that it helps on real experts."""

from __future__ import annotations

import pytest
import torch

import weft
from weft.methods.weave import flattened


def singular(t: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(t.double())


def test_a_power_evens_the_spectrum_and_keeps_norm_rank_and_directions() -> None:
    g = torch.Generator().manual_seed(0)
    t = torch.randn(12, 5, generator=g, dtype=torch.float64) @ torch.randn(
        5, 9, generator=g, dtype=torch.float64
    )
    for power in (0.0, 0.25, 1.0):
        made = flattened(t, power)
        s, before = singular(made), singular(t)[:5]
        assert made.norm() == pytest.approx(float(t.norm())) and bool((s[5:] < 1e-9 * s[0]).all())
        assert torch.allclose(s[:5] / s[0], (before / before[0]) ** power)
        u, _, vh = torch.linalg.svd(t, full_matrices=False)
        assert torch.allclose(u[:, :5] @ (u[:, :5].T @ made @ vh[:5].T) @ vh[:5], made)
    assert torch.allclose(flattened(t, 1.0), t)
    assert torch.allclose(flattened(1e-30 * t, 0.25), 1e-30 * flattened(t, 0.25), rtol=1e-9, atol=0)
    assert not flattened(torch.zeros(3, 4), 0.25).any()


def test_it_is_the_gram_solver_where_nothing_is_evened_or_scaled() -> None:
    g = torch.Generator().manual_seed(1)

    def model() -> dict[str, torch.Tensor]:
        return {"w": torch.randn(6, 4, generator=g), "c": torch.randn(4, 2, 3, 3, generator=g),
                "b": torch.randn(6, generator=g)}  # fmt: skip

    base, *experts = (model() for _ in range(4))
    plain = weft.merge(experts, "weave", base=base, power=1.0, scale=1.0).state_dict()
    other = weft.merge(experts, "gram", base=base).state_dict()
    assert all(torch.allclose(plain[n], other[n], atol=1e-6) for n in base)
    made = weft.merge(experts, "weave", base=base, power=0.0, scale=2.0).state_dict()
    for name in ("w", "c"):
        change = (made[name] - base[name]).flatten(1)
        s = singular(change)
        assert torch.allclose(s, s.mean().expand_as(s), rtol=1e-4)
        assert float(change.norm()) == pytest.approx(2 * float((other[name] - base[name]).norm()), rel=1e-4)
    assert torch.allclose(made["b"] - base["b"], 2 * (other["b"] - base["b"]), atol=1e-5)


def test_on_real_experts_it_beats_published_merges_at_their_defaults() -> None:
    """The demo's five views of digits, test images, no tuning: without data, and with 32 inputs a task."""
    pytest.importorskip("sklearn")
    from weft.bench.run import bench

    names = ["weave", "weave_data", "tsv", "iso_c", "swudi_a", "regmean", "ties"]
    found = bench("digits", names, samples=32, tune=False)
    at = {n: found.normalised(found.row(n)) for n in names}
    low = {n: found.lowest(found.row(n)) for n in names}
    assert at["weave"] > max(at[n] for n in ("tsv", "iso_c", "swudi_a", "ties"))
    assert at["weave_data"] > max(at["weave"], at["regmean"])
    assert low["weave_data"] > max(low[n] for n in ("tsv", "iso_c", "swudi_a", "regmean", "ties"))
