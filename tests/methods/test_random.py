"""The random counter: exact vectors, uniformity, independence, and no dependence on cuts."""

from __future__ import annotations

import pytest
import torch

from weft.methods.random import stream_key, threshold, uniform_bits
from weft.methods.registry import METHODS
from weft.methods.step import At

N = 200_000


def draw(n=N, model=0, start=0, **at):
    return uniform_bits(At(start=start, **{"name": "a", **at}), model, n)


def test_vectors():
    """The numbers other implementations must reproduce."""
    assert stream_key(0, 0, "a") == (0x943AD894, 0x1B28E8F9)
    assert draw(4).tolist() == [682482028, 3125347491, 3758911893, 51731836]
    assert draw(2, start=(1 << 32) - 1).tolist() == [3523250522, 3801758312]


def test_uniform():
    bits = draw()
    assert int(bits.min()) >= 0 and int(bits.max()) < 1 << 32
    u = bits.double() / 2**32
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / N) ** 0.5
    counts = torch.bincount((u * 256).long(), minlength=256).double()
    chi2 = float(((counts - N / 256) ** 2 / (N / 256)).sum())
    assert 150 < chi2 < 380
    for bit in range(32):
        assert abs(((bits >> bit) & 1).double().mean() - 0.5) < 5 * 0.5 / N**0.5


@pytest.mark.parametrize("other", [{"model": 1}, {"name": "b"}, {"seed": 1}, {"start": 1}, {"start": 1 << 32},
                                   {"start": 1 << 16}, {"start": 64}])  # fmt: skip
def test_independent(other):
    a, b = (draw(**o).double() for o in ({}, other))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / N**0.5
    both = ((a < 2**31) & (b < 2**31)).double().mean()
    assert abs(both - 0.25) < 5 * (0.25 * 0.75 / N) ** 0.5
    # no bit of one is a copy of a bit of the other
    p = [torch.stack([(v.long() >> i) & 1 for i in range(32)]).double() - 0.5 for v in (a, b)]
    assert (p[0] @ p[1].T / N * 4).abs().max() < 6 / N**0.5


def test_cut_invariant_even_across_the_word():
    start = (1 << 32) - 1000
    whole = draw(3000, start=start)
    cut = torch.cat([draw(n, start=start + a) for a, n in ((0, 999), (999, 2), (1001, 1999))])
    assert torch.equal(whole, cut)
    assert draw(0).shape == (0,)


def test_threshold_is_exact_at_the_ends():
    assert threshold(0.0) == 0 and threshold(1.0) == 1 << 32


@pytest.mark.parametrize("name", ["dare", "della_linear"])
def test_drops_are_unbiased(name):
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    trials = torch.stack([METHODS[name](x, at=At(name="a", seed=s), density=0.4) for s in range(600)])
    error = (trials.mean(0) - x[0]) / (trials.std(0) / 600**0.5).clamp(min=1e-12)
    assert error.abs().max() < 5
    kept = (trials != 0).double().mean()
    assert abs(kept - 0.4) < 0.02


def test_seed_name_and_model_matter():
    x = torch.randn(1, 64).expand(2, 64)
    m = METHODS["dare"]
    a = m(x, at=At(name="a", seed=1))
    assert torch.equal(a, m(x, at=At(name="a", seed=1)))
    assert not torch.equal(a, m(x, at=At(name="a", seed=2)))
    assert not torch.equal(a, m(x, at=At(name="b", seed=1)))
    # two equal models draw different masks
    assert set((a / x[0]).round().unique().tolist()) == {0.0, 2.0, 4.0}


@pytest.mark.parametrize("epsilon", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_della_keeps_its_density_whatever_the_window(density, epsilon):
    from weft.methods.della import keep_probability

    chance = keep_probability(torch.randn(40, 17), density, epsilon)
    assert chance.min() >= 0 and chance.max() <= 1
    torch.testing.assert_close(chance.mean(), torch.tensor(density, dtype=torch.float64))
    one = keep_probability(torch.randn(3, 1), density, epsilon)
    assert (one == density).all()


def test_della_gives_equal_magnitudes_one_chance():
    from weft.methods.della import keep_probability

    chance = keep_probability(torch.tensor([[1.0, -1.0, 0.5, 1.0]]), 0.5, 0.3)
    torch.testing.assert_close(chance, torch.tensor([[0.6, 0.6, 0.2, 0.6]], dtype=torch.float64))
