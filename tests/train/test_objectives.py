"""Objectives: values and gradients against formulas written out, sums, and SAM's gradient."""

from __future__ import annotations

import pytest
import torch
from charted_nets import Data, moved, perceptron
from torch import Tensor
from torch.nn import functional as F

import weft
from weft.errors import DataError, UsageError
from weft.train import Charted, Linearised, LowRank, Shared, chosen
from weft.train.objectives import (
    Batch,
    Objective,
    Point,
    l2_sp,
    one_hot_squared,
    quadratic,
    sharpness_aware,
    supervised,
)


def at(model: Charted, data: Data) -> Point:
    return Point(model, model.phi, Batch((data[0].double(),), {}, data[1]))


def slope(objective: Objective, point: Point) -> dict[str, Tensor]:
    names = list(point.phi)
    return dict(zip(names, torch.autograd.grad(objective(point), [point.phi[n] for n in names]), strict=True))


def test_quadratics_and_their_gradients_are_the_formula(blobs: Data) -> None:
    net = perceptron().double()
    model = moved(Charted(net), 0.2)
    fisher = {n: torch.rand_like(p) for n, p in net.named_parameters()}
    point = at(model, blobs)
    step = {n: p - net.get_parameter(n) for n, p in model.phi.items()}
    expected = sum(0.5 * (fisher[n] * d * d).sum() for n, d in step.items())
    assert float(quadratic(fisher)(point).detach()) == pytest.approx(float(expected.detach()))
    found = slope(0.3 * quadratic(fisher) + 2 * l2_sp(), point)
    for n, d in step.items():
        assert torch.allclose(found[n], 0.3 * fisher[n] * d + 2 * d)
    stored = weft.load({f"fisher/{n}": f for n, f in fisher.items()})
    assert quadratic(stored)(point) == quadratic(fisher)(point)


def test_a_quadratic_sees_the_weights_behind_a_chart(blobs: Data) -> None:
    net = perceptron().double()
    ones = {n: torch.ones_like(p) for n, p in net.named_parameters()}
    low = moved(Charted(net, LowRank(net, ["2.weight"], rank=2)), 0.3)
    b, a = (low.phi[f"2.weight:{part}"] for part in "BA")
    assert float(quadratic(ones)(at(low, blobs))) == pytest.approx(float(0.5 * (b @ a).square().sum()))
    # through a mean of two the cross term of their steps is there: F (τ1 + τ2)² / 8
    tau = {n: torch.full_like(p, 0.5) for n, p in net.named_parameters()}
    shared = Charted(net, Shared(net, list(ones), [tau]))
    with torch.no_grad():
        for p in shared.phi.values():
            p += 0.7
    count = sum(p.numel() for p in net.parameters())
    assert float(quadratic(ones)(at(shared, blobs))) == pytest.approx(count * 1.2**2 / 8)


def test_sharpness_aware_has_sams_gradient(blobs: Data) -> None:
    net = perceptron().double()
    model = moved(Charted(net), 0.2)
    point, rho = at(model, blobs), 0.3
    found = slope(sharpness_aware(supervised(), rho), point)
    names = list(point.phi)

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        leaves = [w.detach().requires_grad_() for w in weights]
        out = torch.func.functional_call(net, dict(zip(names, leaves, strict=True)), (blobs[0].double(),))
        return list(torch.autograd.grad(F.cross_entropy(out, blobs[1]), leaves))

    g = gradient([point.phi[n] for n in names])
    norm = torch.cat([t.flatten() for t in g]).norm()
    expected = gradient([point.phi[n] + rho * t / norm for n, t in zip(names, g, strict=True)])
    for n, e in zip(names, expected, strict=True):
        assert torch.allclose(found[n], e, atol=1e-12)
    plain = slope(supervised(), point)
    assert not torch.allclose(found["0.weight"], plain["0.weight"], atol=1e-3)
    flat = slope(sharpness_aware(supervised(), 0.0), point)
    assert all(torch.allclose(flat[n], plain[n]) for n in names)


def test_the_one_hot_square_is_convex_in_the_tangent(blobs: Data) -> None:
    net = perceptron().double()
    loss, data = supervised(one_hot_squared(5.0)), blobs
    ends = [moved(Linearised(net), 0.3, seed=i) for i in (1, 2)]
    between = Linearised(net)
    values = []
    for t in torch.linspace(0, 1, 9, dtype=torch.float64):
        with torch.no_grad():
            for n, p in between.phi.items():
                p.copy_((1 - t) * ends[0].phi[n] + t * ends[1].phi[n])
            values.append(float(loss(at(between, data))))
    bends = [values[i - 1] - 2 * values[i] + values[i + 1] for i in range(1, 8)]
    assert min(bends) > 0 and max(bends) == pytest.approx(min(bends), rel=1e-6), "a parabola"


def test_a_penalty_keeps_the_weights_nearer(blobs: Data) -> None:
    net = perceptron()
    runs = [
        weft.finetune(net, blobs, objective=supervised() + s * l2_sp(), epochs=8, lr=1e-2)
        for s in (0.0, 0.1, 1.0)
    ]
    lengths = [sum(float(d.square().sum()) for d in r.model.delta().values()) for r in runs]
    assert lengths[0] > 1.5 * lengths[1] > 3 * lengths[2]
    plain = weft.finetune(net, blobs, epochs=8, lr=1e-2)
    assert torch.equal(plain.checkpoint.tensor("0.weight"), runs[0].checkpoint.tensor("0.weight"))


def test_importances_that_do_not_fit_are_all_named(blobs: Data) -> None:
    net = perceptron()
    names = chosen(net)
    wrong = {n: torch.ones_like(p) for n, p in net.named_parameters()}
    wrong["0.weight"] = torch.ones(2)
    wrong["2.weight"] *= -1
    wrong.pop("4.bias")
    model = Charted(net)
    with pytest.raises(DataError) as told:
        quadratic(wrong)(Point(model, model.phi, Batch((blobs[0],), {}, blobs[1])))
    assert all(
        part in str(told.value)
        for part in ("0.weight: shape [2]", "2.weight: has values", "4.bias: has none")
    )
    assert len(names) == 6
    with pytest.raises(UsageError, match="rho must be 0 or more"):
        sharpness_aware(l2_sp(), -1.0)
