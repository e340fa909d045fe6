"""Analyses of weights alone, streamed, against dense float64 references; and of features between models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from analysis_models import F64, digits, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import weft
from weft.analysis.linearity import feature_linearity
from weft.analysis.network import Network
from weft.analysis.overlap import effective_rank, subspace_overlap
from weft.analysis.parallel import in_parallel
from weft.analysis.representation import linear_cka, representation_bias
from weft.analysis.similarity import similarity
from weft.analysis.trajectory import variance_decay
from weft.checkpoints.execution import Execution, executing
from weft.errors import DataError, UsageError


def weights(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "layers.0.w": torch.randn(200, 300, generator=g),
        "layers.1.w": torch.randn(30, 20, generator=g),
        "layers.1.b": torch.randn(30, generator=g),
        "steps": torch.tensor(seed),
    }


def flattened(state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in state.values() if t.is_floating_point()])


def test_matrices_agree_with_dense_arithmetic_and_do_not_depend_on_the_cut() -> None:
    models, base = [weights(s) for s in (1, 2, 3)], weights(0)
    sources = [weft.load(m) for m in models]
    found = similarity(sources, weft.load(base))
    d = torch.stack([flattened(m) - flattened(base) for m in models])
    for i in range(3):
        assert found.norms[i] == pytest.approx(float(d[i].norm()))
        for j in range(3):
            assert found.cosine[i][j] == pytest.approx(
                float(torch.cosine_similarity(d[i], d[j], dim=0)), abs=1e-12
            )
            assert found.correlation[i][j] == pytest.approx(float(torch.corrcoef(d)[i, j]), abs=1e-12)
            assert found.distance[i][j] == pytest.approx(float((d[i] - d[j]).norm()), abs=1e-6)
            assert found.conflict[i][j] == pytest.approx(float((d[i] * d[j] < 0).double().mean()), abs=1e-15)
    pairs = [(1, 0), (2, 0), (2, 1)]
    assert found.kinship == pytest.approx(sum(found.cosine[i][j] for i, j in pairs) / 3)  # type: ignore[misc]
    assert found.layers == ("layers.0", "layers.1")
    second = torch.stack(
        [flattened({k: m[k].double() - base[k].double() for k in m if "1." in k}) for m in models]
    )
    expected = sum(float(torch.cosine_similarity(second[i], second[j], dim=0)) for i, j in pairs) / 3
    assert found.layer_cosine[1] == pytest.approx(expected)
    with executing(Execution(chunk=1 << 14)):
        assert similarity(sources, weft.load(base)) == found
    with in_parallel(2):
        assert similarity(sources, weft.load(base)) == found


def test_the_sign_of_opposite_vectors_is_kept_and_zero_vectors_have_no_cosine() -> None:
    base, delta = weights(0), weights(1)
    there = weft.load({n: base[n] + delta[n] for n in base})
    back = weft.load({n: base[n] - delta[n] for n in base})
    found = similarity([there, back, weft.load(base)], weft.load(base))
    assert found.cosine[0][1] == pytest.approx(-1.0, abs=1e-6) and found.conflict[0][1] > 0.9999
    assert found.cosine[0][2] is None and found.conflict[0][2] == 0.0 and found.kinship is None
    assert "kinship) none" in found.headline
    assert found.to_json()["cosine"][0][2] is None


def test_a_lazy_merge_is_compared_as_its_values_are() -> None:
    base, a, b = (weft.load(weights(s)) for s in (0, 1, 2))
    found = similarity([weft.merge([a, b]), base + 0.25 * (a - base)], base)
    assert found.norms[1] == pytest.approx(float((flattened(weights(1)) - flattened(weights(0))).norm()) / 4)


def test_models_that_do_not_fit_are_told_of_all_at_once() -> None:
    good = weights(0)
    other = {n: t for n, t in weights(1).items() if n != "layers.1.b"} | {"layers.1.w": torch.zeros(3, 3)}
    with pytest.raises(DataError) as error:
        similarity([weft.load(good), weft.load(other)])
    assert "'layers.1.b': not in" in str(error.value) and "shape [30, 20]" in str(error.value)
    bad = weights(1)
    bad["layers.1.b"][0] = math.inf
    with pytest.raises(DataError, match=r"NaN or infinite values[^$]*layers\.1\.b"):
        similarity([weft.load(good), weft.load(bad)])
    with pytest.raises(UsageError, match="at least two"):
        similarity([weft.load(good)])


def test_overlap_of_planted_subspaces_is_exact() -> None:
    q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=F64, generator=torch.Generator().manual_seed(0)))
    p, _ = torch.linalg.qr(torch.randn(9, 9, dtype=F64, generator=torch.Generator().manual_seed(1)))
    base = {"w": torch.zeros(12, 9, dtype=F64)}

    def model(columns: list[int], rows: list[int]) -> weft.Checkpoint:
        return weft.load(
            {"w": q[:, columns] @ torch.diag(torch.tensor([3.0, 2.0], dtype=F64)) @ p[:, rows].T}
        )

    a, b, c = model([0, 1], [0, 1]), model([0, 2], [0, 1]), model([3, 4], [5, 6])
    found = subspace_overlap([a, b, c], weft.load(base), energy=0.99).matrices[0]
    assert found.ranks == (2, 2, 2) and found.chance == pytest.approx(2 / 12)
    expected = [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(torch.tensor(found.written), torch.tensor(expected, dtype=torch.float32))
    assert found.read[0][1] == pytest.approx(1.0) and found.read[0][2] == pytest.approx(0.0, abs=1e-12)
    apart = subspace_overlap([a, c], weft.load(base)).matrices[0]
    assert apart.interference == pytest.approx(0.0, abs=1e-10)
    assert subspace_overlap([a, a], weft.load(base)).matrices[0].interference > 0.3


def test_effective_rank_and_requests_that_cannot_be_meant() -> None:
    s = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert [effective_rank(s, e) for e in (0.5, 4 / 6, 0.7, 5 / 6, 1.0)] == [1, 1, 2, 2, 3]
    assert effective_rank(torch.zeros(3), 0.9) == 0
    vector = weft.load({"b": torch.ones(4)})
    with pytest.raises(UsageError, match="no matrices"):
        subspace_overlap([vector, vector], vector)
    with pytest.raises(UsageError, match="0 < energy"):
        subspace_overlap([vector, vector], vector, energy=0.0)
    same = weft.load(weights(0))
    still = subspace_overlap([same, same], same)
    assert all(m.ranks == (0, 0) and m.interference == 0 for m in still.matrices)


def test_independent_noise_averages_with_slope_minus_one_and_a_drift_hardly_at_all() -> None:
    g = torch.Generator().manual_seed(0)
    noise = [{"w": 5 + torch.randn(4000, generator=g)} for _ in range(16)]
    found = variance_decay(noise)
    assert found.slope == pytest.approx(-1.0, abs=0.05)
    assert found.variance[0] == pytest.approx(4000, rel=0.05)
    drift = [{"w": torch.full((10,), float(i))} for i in range(16)]
    assert variance_decay(drift).slope > -0.3
    with pytest.raises(UsageError, match="four checkpoints"):
        variance_decay(noise[:3])


@settings(deadline=None, max_examples=20)
@given(st.integers(4, 9), st.integers(0, 99))
def test_variance_of_windows_is_that_of_their_means(count: int, seed: int) -> None:
    x = torch.randn(count, 7, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 3
    found = variance_decay([{"w": row} for row in x])
    for k, value in zip(found.windows, found.variance, strict=True):
        number = count // k
        means = x[count - number * k :].reshape(number, k, 7).mean(1)
        assert value == pytest.approx(float(means.var(0).sum()), rel=1e-6)


def test_losses_along_a_run_are_those_of_its_checkpoints_and_of_tail_means() -> None:
    train, _ = digits()
    run = [trained(s) for s in (1, 2, 3, 4)]
    found = variance_decay(run, Network(run[0], train))
    assert found.losses is not None and found.averaged is not None
    net = Network(run[0], train)
    assert found.losses[2] == net.measure(net.state(run[2])).loss
    last = weft.merge([run[2], run[3]]).state_dict()
    assert found.averaged[0] == pytest.approx(found.losses[3])
    assert found.averaged[1] == pytest.approx(net.measure(net.state(last)).loss, rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.sampled_from([(30, 5, 8), (6, 20, 9)]))
def test_cka_is_blind_to_rotation_scale_and_shift_only(
    seed: int, scale: float, sizes: tuple[int, int, int]
) -> None:
    n, p, q = sizes
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, p, dtype=F64, generator=g), torch.randn(n, q, dtype=F64, generator=g)
    turn, _ = torch.linalg.qr(torch.randn(p, p, dtype=F64, generator=g))
    assert linear_cka(x, x) == pytest.approx(1.0)
    assert linear_cka(scale * x @ turn + 3, y) == pytest.approx(linear_cka(x, y), abs=1e-9)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x)) and 0 <= linear_cka(x, y) <= 1
    stretched = x @ torch.diag(torch.arange(1.0, p + 1, dtype=F64) ** 3)
    assert linear_cka(x, stretched) < 0.999


def test_cka_in_its_two_forms_and_its_errors() -> None:
    x, y = torch.randn(7, 3, dtype=F64), torch.randn(7, 4, dtype=F64)
    h = torch.eye(7, dtype=F64) - 1 / 7
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))
    assert linear_cka(torch.ones(5, 2), torch.randn(5, 2)) == 0.0
    with pytest.raises(UsageError, match="5 and 4"):
        linear_cka(torch.randn(5, 2), torch.randn(4, 2))
    with pytest.raises(DataError, match="two examples"):
        linear_cka(torch.randn(1, 2), torch.randn(1, 2))


def test_bias_towards_itself_is_zero_and_towards_a_permuted_copy_is_l1_only() -> None:
    train, _ = digits()
    model = trained(1)
    net = Network(model, train)
    same = representation_bias(net, model, model)
    assert same.layers == ("layers.1", "layers.2", "output")
    assert set(same.l1) == {0.0} and same.cka == pytest.approx((1.0, 1.0, 1.0))
    state = model.state_dict()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    permuted = dict(state)
    for name in ("layers.0.weight", "layers.0.bias"):
        permuted[name] = state[name][order]
    permuted["layers.1.weight"] = state["layers.1.weight"][:, order]
    found = representation_bias(net, permuted, model)
    assert found.l1[0] > 0.1 and found.l1[1] == pytest.approx(0.0, abs=1e-5)
    assert found.cka == pytest.approx((1.0, 1.0, 1.0))


def test_features_of_a_linear_network_are_exactly_linear_in_one_layer() -> None:
    from torch import nn

    a, b = nn.Linear(5, 4, dtype=F64), nn.Linear(5, 4, dtype=F64)
    net = Network(a, (torch.randn(9, 5, dtype=F64), torch.zeros(9).long()))
    found = feature_linearity(net, [a, b], [0.3, 0.7])
    assert found.layers == ("output",)
    assert found.cosine[0] == pytest.approx(1.0) and found.scale[0] == pytest.approx(1.0)
    # task arithmetic in feature space: coefficients that add up to one, over base and models
    more = feature_linearity(net, [a, b, nn.Linear(5, 4, dtype=F64)], [1 - 2 * 0.4, 0.4, 0.4])
    assert more.cosine[0] == pytest.approx(1.0) and more.scale[0] == pytest.approx(1.0)
    with pytest.raises(UsageError, match="at least two"):
        feature_linearity(net, [a])


def test_features_of_independent_networks_are_not_linear_and_collapse() -> None:
    train, _ = digits()
    net = Network(trained(1), train)
    found = feature_linearity(net, [trained(1), trained(2)], names=("a", "b"))
    assert found.layers == ("layers.1", "layers.2", "output")
    # of one weight layer by hand
    with torch.no_grad():
        own = [trained(s).layers[0](train[0]).relu() for s in (1, 2)]
        middle = {n: (v + trained(2).state_dict()[n]) / 2 for n, v in trained(1).state_dict().items()}
        mixed = (train[0] @ middle["layers.0.weight"].T + middle["layers.0.bias"]).relu()
    mixture = (own[0] + own[1]) / 2
    assert found.cosine[0] == pytest.approx(float(torch.cosine_similarity(mixed, mixture).mean()), abs=1e-5)
    scale = ((mixed * mixture).sum(1) / mixture.square().sum(1)).mean()
    assert found.scale[0] == pytest.approx(float(scale), abs=1e-5)
    assert (
        found.scale[-1]
        < 0.6
        < 0.95
        < feature_linearity(net, [trained(1)] * 2 + [trained(2)], [0.5, 0.5, 0]).scale[-1]
    )
