"""Ensembles, the decomposition of an average's error, and the two theories of averaged SGD."""

from __future__ import annotations

import pytest
import torch
from analysis_models import F64, Mlp, digits, fit, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.analysis.decomposition import bias_variance, decompose
from weft.analysis.ensemble import Ensemble, ensemble_gap, mixed_outputs
from weft.analysis.least_squares import tail_averaging
from weft.analysis.network import Network
from weft.analysis.stability import sgd_stability
from weft.errors import UsageError


def test_outputs_are_mixed_as_the_formulas_say() -> None:
    logits = torch.randn(3, 6, 4, dtype=F64)
    w = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    p = (logits / 2).softmax(-1)
    mixed = torch.einsum("k,knc->nc", w, p)
    torch.testing.assert_close(mixed_outputs(logits, "probabilities", w.tolist(), 2.0).exp(), mixed)
    geometric = torch.einsum("k,knc->nc", w, p.log()).exp()
    torch.testing.assert_close(
        mixed_outputs(logits, "geometric", w.tolist(), 2.0).exp(), geometric / geometric.sum(-1, keepdim=True)
    )
    torch.testing.assert_close(mixed_outputs(logits, "logits"), logits.mean(0))
    sure = mixed_outputs(logits, "confident").exp()
    for n in range(6):
        best = max(range(3), key=lambda k: float(logits[k, n].softmax(-1).max()))
        torch.testing.assert_close(sure[n], logits[best, n].softmax(-1))


@pytest.mark.parametrize("how", ["probabilities", "logits", "geometric", "confident"])
def test_copies_of_a_model_are_that_model(how: str) -> None:
    (x, _), model = digits()[0], trained(1)
    with torch.no_grad():
        expected = model(x).softmax(-1)
        found = Ensemble([model, model], how)(x).softmax(-1)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [0.5, 0.6]}, "add up to 1"),
        ({"weights": [1.0]}, "as many weights"),
        ({"how": "probability"}, "did you mean 'probabilities'"),
        ({"temperature": 0.0}, "positive"),
    ],
)
def test_ensembles_that_cannot_be_meant(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Ensemble([trained(1), trained(2)], **arguments)  # type: ignore[arg-type]


def test_the_ensemble_is_no_worse_than_the_mean_of_its_models_and_averaging_strangers_fails() -> None:
    _, test = digits()
    models = [trained(s) for s in (1, 2)]
    found = ensemble_gap(Network(models[0], test), models, names=("a", "b"))
    assert found.names == ("a", "b", "weight average", "ensemble: probabilities", "ensemble: logits")
    assert found.losses[3] <= sum(found.losses[:2]) / 2  # Jensen
    assert found.errors[3] <= max(found.errors[:2])  # type: ignore[type-var]
    assert found.gap > 0.3
    same = ensemble_gap(Network(models[0], test), [models[0]] * 3)
    assert same.gap == pytest.approx(0.0, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 999))
def test_the_decomposition_adds_up(draws: int, members: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    f, y = (
        torch.randn(draws, members, 6, 3, dtype=F64, generator=g),
        torch.randn(6, 3, dtype=F64, generator=g),
    )
    d = decompose(f, y)
    m = d.members
    assert d.bias + d.variance / m + (m - 1) / m * d.covariance == pytest.approx(d.ensemble, abs=1e-10)
    assert d.single == pytest.approx(d.bias + d.variance, abs=1e-10)
    centre = f.mean((0, 1))
    pairs = [((f[r, a] - centre) * (f[r, b] - centre)).sum(-1).mean() for r in range(draws)
             for a in range(members) for b in range(members) if a != b]  # fmt: skip
    assert d.covariance == pytest.approx(float(sum(pairs)) / len(pairs) if pairs else 0.0, abs=1e-10)
    if draws == 1 and members > 1:
        assert d.covariance == pytest.approx(-d.variance / (members - 1))


def test_independent_members_have_no_covariance_and_identical_ones_all_of_it() -> None:
    f = torch.randn(200, 4, 5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    free = decompose(f, torch.zeros(5, 2, dtype=F64))
    assert abs(free.covariance) < 0.05 * free.variance
    assert free.ensemble == pytest.approx(free.single / 4, rel=0.1)
    copies = decompose(f[:, :1].expand(-1, 4, -1, -1), torch.zeros(5, 2, dtype=F64))
    assert copies.covariance == pytest.approx(copies.variance)
    with pytest.raises(UsageError, match="draws, members"):
        decompose(f, torch.zeros(4, 2))


def test_the_average_of_linear_models_is_their_ensemble_and_locality_is_the_distance() -> None:
    torch.manual_seed(0)
    models = [[nn.Linear(3, 1, dtype=F64) for _ in range(3)] for _ in range(2)]
    net = Network(models[0][0], (torch.randn(20, 3, dtype=F64), torch.randn(20, 1, dtype=F64)), loss="mse")
    found = bias_variance(net, models)
    assert found.gap == pytest.approx(0.0, abs=1e-12)
    vectors = torch.stack(
        [torch.stack([torch.cat([m.weight[0], m.bias]) for m in draw]) for draw in models]
    ).detach()
    far = (vectors - vectors.mean(1, keepdim=True)).square().sum(-1).amax(1).mean()
    assert found.locality == pytest.approx(float(far))
    with pytest.raises(UsageError, match="same number"):
        bias_variance(net, [models[0], models[1][:2]])


def test_the_gap_of_real_networks_grows_with_the_distance() -> None:
    train, test = digits()
    start = fit(Mlp((64, 48, 48, 10), 5), train, epochs=4)
    near = [[fit(_copy(start), train, seed=s, epochs=3, rate=3e-4) for s in (1, 2)] for _ in range(1)]
    far = [[trained(1), trained(2)]]
    close, distant = (bias_variance(Network(start, test), d) for d in (near, far))
    assert close.locality < 0.1 * distant.locality  # type: ignore[operator]
    assert abs(close.gap) < 0.01 < distant.gap  # type: ignore[arg-type, operator]


def _copy(net: nn.Module) -> nn.Module:
    from copy import deepcopy

    return deepcopy(net)


def test_the_exact_recursion_is_what_a_simulation_finds() -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.tensor([1.0, 0.5, 0.2], dtype=F64)
    start, noise, rate, batch, steps, runs = 1.0, 0.5, 0.15, 2, 60, 20_000
    found = tail_averaging(h.tolist(), noise=noise, rate=rate, steps=[steps], batch=batch, start=start)
    e = torch.full((runs, 3), start, dtype=F64)
    kept = []
    for _ in range(steps):
        x = torch.randn(runs, batch, 3, dtype=F64, generator=g) * h.sqrt()
        eps = noise * torch.randn(runs, batch, dtype=F64, generator=g)
        residual = torch.einsum("rbd,rd->rb", x, e) - eps
        e = e - rate * torch.einsum("rb,rbd->rd", residual, x) / batch
        kept.append(e)

    def risk(w: Tensor) -> tuple[float, float]:
        values = 0.5 * (w.square() * h).sum(1)
        return float(values.mean()), float(values.std()) / runs**0.5

    for expected, w in ((found.last[0], kept[-1]), (found.tail[0], torch.stack(kept[steps // 2 :]).mean(0))):
        value, error = risk(w)
        assert abs(value - expected) < 4 * error


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.05, 2.0), min_size=1, max_size=6), st.floats(0.0, 2.0), st.floats(0.05, 1.0),
    st.integers(1, 8), st.floats(0.1, 3.0), st.sampled_from([0.25, 0.5, 0.9]),
)  # fmt: skip
def test_the_bound_holds(
    h: list[float], noise: float, share: float, batch: int, start: float, tail: float
) -> None:
    largest = tail_averaging(h, noise=0.0, rate=1e-6, steps=[2], batch=batch).largest_rate
    found = tail_averaging(
        h, noise=noise, rate=share * largest / 2, steps=[10, 100, 400], tail=tail, batch=batch, start=start
    )
    for value, bound in zip(found.tail, found.bound, strict=True):
        assert value <= bound * (1 + 1e-9)


def test_without_noise_the_bias_falls_exponentially_in_the_burn_in() -> None:
    found = tail_averaging([1.0], noise=0.0, rate=0.05, steps=[100, 200, 300], tail=0.5)
    assert found.tail[1] < found.tail[0] * 0.95**50 and found.tail[2] < found.tail[1] * 0.95**50
    with pytest.raises(UsageError, match="step must be between"):
        tail_averaging([1.0], noise=0.0, rate=5.0, steps=[10])
    with pytest.raises(UsageError, match="eigenvalues must be positive"):
        tail_averaging([1.0, 0.0], noise=0.0, rate=0.1, steps=[10])


def test_neighbouring_runs_agree_until_the_replaced_example_is_seen() -> None:
    x, y = digits()[0]
    x, y = x[:40], (y[:40] > 4).long()
    found = sgd_stability(x, y, steps=1, replicas=8000, windows=[1], seed=1, rate=1e-3)
    # one step from 0 moves by ±x/2; it saw the replaced example with probability 1/n
    own, other = (0.5 - y.double())[:, None] * x.double(), (y.double() - 0.5)[:, None] * x.double()
    expected = 1e-3 / 40 * float(torch.cdist(own, other).mean())
    assert found.distance[0] == pytest.approx(expected, rel=0.2)
    assert found.distance[0] <= found.bound[0]
    with pytest.raises(UsageError, match="0 or 1"):
        sgd_stability(x, torch.arange(40), steps=5)
    with pytest.raises(UsageError, match="2/β"):
        sgd_stability(x, y, steps=5, rate=1e9)
    with pytest.raises(UsageError, match="windows"):
        sgd_stability(x, y, steps=5, windows=[6])
