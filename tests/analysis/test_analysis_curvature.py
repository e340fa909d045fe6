"""Hessians, tangent kernels and disentanglement, against exact values."""

from __future__ import annotations

import pytest
import torch
from analysis_models import F64, Mlp, digits, point, potential, trained
from torch import Tensor, nn
from torch.nn import functional as F

from weft.analysis.disentanglement import disentanglement, total_variation
from weft.analysis.network import Network
from weft.analysis.ntk import kernel_alignment, ntk_localisation, tangent_kernel
from weft.analysis.sharpness import hessian_trace, lanczos, sharpness
from weft.analysis.space import flat, shaped
from weft.errors import UsageError


def quadratic(seed: int, n: int = 12) -> tuple[Network, Tensor]:
    """½ xᵀAx with a random symmetric A."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    a = a + a.T
    return potential(lambda x: 0.5 * x @ a @ x, n), a


@pytest.mark.parametrize("seed", range(3))
def test_trace_and_eigenvalues_of_a_quadratic_are_exact(seed: int) -> None:
    net, a = quadratic(seed)
    state = net.state(point(*[0.3] * 12))
    trace, error = hessian_trace(net, state, probes=12)
    assert trace == pytest.approx(float(a.trace()), abs=1e-10) and error == 0.0
    torch.testing.assert_close(lanczos(net, state, 12), torch.linalg.eigvalsh(a), rtol=0, atol=1e-8)
    found = sharpness(net, point(*[0.3] * 12), probes=12, steps=12, eigenvalues=3)
    assert found.eigenvalues == pytest.approx(torch.linalg.eigvalsh(a).flip(0)[:3].tolist(), abs=1e-8)
    assert found.smallest == pytest.approx(float(torch.linalg.eigvalsh(a)[0]), abs=1e-8)


def test_one_probe_of_signs_is_exact_where_the_hessian_is_diagonal() -> None:
    d = torch.arange(1.0, 9, dtype=F64)
    net = potential(lambda x: 0.5 * (d * x.square()).sum(), 8)
    assert hessian_trace(net, net.state(point(*[0.0] * 8)), probes=1)[0] == pytest.approx(36.0)


def test_hutchinson_is_unbiased_within_its_error() -> None:
    net, a = quadratic(5)
    state = net.state(point(*[0.0] * 12))
    found = [hessian_trace(net, state, probes=8, seed=s) for s in range(40)]
    mean = sum(t for t, _ in found) / 40
    error = sum(e**2 for _, e in found) ** 0.5 / 40
    assert abs(mean - float(a.trace())) < 4 * error


def test_lanczos_on_a_real_network_finds_the_hessians_ends() -> None:
    model = Mlp((4, 5, 3), 0).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))
    net = Network(model, (x, y))
    state = net.state(model)

    def loss(v: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, shaped(v, state, net.parameters), (x,)), y)

    exact = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat(state, net.parameters)))
    found = lanczos(net, state, 30)
    assert float(found[-1]) == pytest.approx(float(exact[-1]), rel=1e-6)
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-6)
    few = lanczos(net, state, 8)
    assert len(few) == 8 and exact[0] - 1e-9 <= few[0] and few[-1] <= exact[-1] + 1e-9


def test_sam_rises_along_the_gradient_and_random_directions_less() -> None:
    net = potential(lambda x: 0.5 * (torch.tensor([100.0, 1.0], dtype=F64) * x.square()).sum())
    found = sharpness(net, point(1.0, 0.0), radius=0.1, samples=64)
    assert found.sam == pytest.approx(0.5 * 100 * (1.1**2 - 1))
    assert found.random < found.sam / 2
    assert sharpness(net, point(0.0, 0.0), radius=0.1).sam == 0.0  # no gradient, no direction
    with pytest.raises(UsageError, match="positive"):
        sharpness(net, point(0, 0), radius=0)


def test_the_tangent_kernel_is_the_product_of_jacobians() -> None:
    model = Mlp((3, 5, 2), 0).double()
    x = torch.randn(6, 3, dtype=F64)
    net = Network(model, [(x[:4], torch.zeros(4).long()), (x[4:], torch.zeros(2).long())])
    state = net.state(model)

    def outputs(v: Tensor) -> Tensor:
        return torch.func.functional_call(model, shaped(v, state, net.parameters), (x,))

    jacobian = torch.func.jacrev(outputs)(flat(state, net.parameters))  # [n, C, P]
    expected = torch.einsum("icp,jcp->ij", jacobian, jacobian) / 2
    torch.testing.assert_close(tangent_kernel(net, state), expected)


def test_a_linear_model_with_disjoint_inputs_has_local_eigenvectors() -> None:
    model = nn.Linear(6, 2, bias=False, dtype=F64)
    left, right = torch.zeros(5, 6, dtype=F64), torch.zeros(5, 6, dtype=F64)
    left[:, :3], right[:, 3:] = torch.randn(5, 3, dtype=F64), torch.randn(5, 3, dtype=F64)
    labels = torch.tensor([0, 1, 0, 1, 1])
    task, control = (Network(model, (x, labels)) for x in (left, right))
    found = ntk_localisation(task, control, model)
    for value, energy in zip(found.eigenvalues, found.energy, strict=True):
        if value > 1e-9:
            assert min(energy, 1 - energy) < 1e-9
    assert found.share == 0.5 and found.localisation == pytest.approx(1.0)
    # the same inputs twice: every eigenvector is spread evenly
    even = ntk_localisation(task, task, model)
    assert even.localisation == pytest.approx(0.0, abs=1e-6)


def test_alignment_of_kernels() -> None:
    x = torch.randn(10, 4, dtype=F64)
    k = x @ x.T
    assert kernel_alignment(k, 3 * k) == pytest.approx(1.0)
    assert kernel_alignment(k, k + 7.0) == pytest.approx(1.0)  # constants are centred away
    assert kernel_alignment(k, torch.ones(10, 10)) == 0.0
    y = torch.randn(10, 4, dtype=F64)
    assert abs(kernel_alignment(k, y @ y.T)) < 0.9


class Halves(nn.Module):
    """A model whose two tasks use disjoint inputs and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(x[:, :4], self.left.weight) + F.linear(x[:, 4:], self.right.weight)
        return out


def test_disjoint_tasks_are_exactly_disentangled_and_shared_ones_are_not() -> None:
    torch.manual_seed(0)
    base, one, two = Halves(), Halves(), Halves()
    zero = torch.zeros(30, 4)
    inputs = [torch.cat([torch.randn(30, 4), zero], 1), torch.cat([zero, torch.randn(30, 4)], 1)]
    nets = [Network(base, (x, torch.zeros(30).long())) for x in inputs]
    for model, kept in ((one, "right"), (two, "left")):
        getattr(model, kept).load_state_dict(getattr(base, kept).state_dict())
    grid = [-2.0, -0.5, 0.0, 1.0, 2.0]
    found = disentanglement(nets, base, [one, two], alphas=grid)
    assert all(v == 0.0 for row in found.error for v in row) and found.mean == 0.0
    mixed = disentanglement([nets[1], nets[0]], base, [one, two], alphas=grid)
    assert mixed.error[2][2] == 0.0
    assert mixed.error[4][4] > 0.3


def test_the_error_is_the_disagreement_with_each_task_alone() -> None:
    a, b, base = trained(1), trained(2), trained(3)
    train, test = digits()
    nets = [Network(base, d) for d in (train, test)]
    found = disentanglement(nets, base, [a, b], alphas=[0.0, 0.7])
    assert found.error[0][0] == 0.0

    def predict(net: Network, x: float, y: float) -> Tensor:
        state = {
            n: t + x * (a.state_dict()[n] - t) + y * (b.state_dict()[n] - t)
            for n, t in base.state_dict().items()
        }
        with torch.no_grad():
            return torch.func.functional_call(base, state, (net.batches[0][0],)).argmax(1)

    whole = [predict(n, 0.7, 0.7) for n in nets]
    alone = [predict(nets[0], 0.7, 0.0), predict(nets[1], 0.0, 0.7)]
    # the training data come in two batches of which `predict` sees the first
    assert found.error[1][1] > 0
    own = disentanglement([nets[1], nets[1]], base, [a, b], alphas=[0.7])
    first = predict(nets[1], 0.7, 0.0)
    expected = sum(float((p != whole[1]).double().mean()) for p in (first, alone[1]))
    assert own.error[0][0] == pytest.approx(expected, abs=1e-12)
    # with only the first task's vector, the first task's term vanishes
    edge = disentanglement([nets[0], nets[1]], base, [a, b], alphas=[0.0, 0.7])
    second = float((predict(nets[1], 0.0, 0.0) != predict(nets[1], 0.7, 0.0)).double().mean())
    assert edge.error[0][1] == pytest.approx(second, abs=1e-12)


def test_total_variation_and_requests_that_cannot_be_meant() -> None:
    assert total_variation(torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])) == pytest.approx(1.0)
    net = Network(trained(1), digits()[0])
    with pytest.raises(UsageError, match="between two tasks, not 1 models"):
        disentanglement([net, net], trained(1), [trained(2)])
    with pytest.raises(UsageError, match="did you mean 'disagreement'"):
        disentanglement([net, net], trained(1), [trained(2)] * 2, distance="disagrement")  # type: ignore[arg-type]
