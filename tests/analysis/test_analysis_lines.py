"""Lines, planes, curves and paths through weight space, on landscapes that are known and on real networks."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from analysis_models import F64, Mlp, digits, fit, point, potential, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weft.analysis.barrier import barrier
from weft.analysis.curves import along, coefficients, connect
from weft.analysis.layerwise import layerwise_barrier
from weft.analysis.neb import elastic_path
from weft.analysis.network import Network
from weft.analysis.plane import loss_plane, random_plane
from weft.errors import DataError, UsageError

numbers = st.floats(-3, 3, allow_nan=False)


def bowl(x: torch.Tensor) -> torch.Tensor:
    return (torch.tensor([1.0, 5.0], dtype=F64) * x.square()).sum()


def wells(x: torch.Tensor) -> torch.Tensor:
    """(x² − 1)² + 2 (y − 1 + x²)²: minima at (±1, 0), the saddle of height 1 at (0, 1)."""
    return (x[0] ** 2 - 1) ** 2 + 2 * (x[1] - 1 + x[0] ** 2) ** 2


@settings(deadline=None, max_examples=20)
@given(st.tuples(numbers, numbers), st.tuples(numbers, numbers))
def test_a_convex_loss_has_no_barrier_and_identical_models_have_none(a, b) -> None:  # type: ignore[no-untyped-def]
    net = potential(bowl)
    found = barrier(net, point(*a), point(*b))
    assert found.barrier <= 1e-12 * max(1.0, *found.losses)
    same = barrier(net, point(*a), point(*a))
    assert same.barrier <= 1e-14 * max(1.0, same.losses[0])


def test_the_barrier_is_the_rise_over_the_line_between_the_ends() -> None:
    # on the line y = 0 the wells rise to 1 + 2 = 3 in the middle, between ends of 0
    found = barrier(potential(wells), point(-1, 0), point(1, 0), points=21)
    assert found.barrier == pytest.approx(3.0, abs=1e-12) and found.instability == pytest.approx(3.0)
    tilted = potential(lambda x: wells(x) + x[0])
    found = barrier(tilted, point(-1, 0), point(1, 0), points=21)
    assert found.ends == pytest.approx((-1.0, 1.0))
    assert found.barrier == pytest.approx(3.0, abs=1e-12)
    assert found.instability == pytest.approx(max(found.losses))


def test_alignment_is_applied_to_b_and_measured_against_the_original_ends() -> None:
    net = potential(wells)
    seen = []

    def align(b, a):  # type: ignore[no-untyped-def]
        seen.append((b.tensor("point").tolist(), a.tensor("point").tolist()))
        return {"point": -b.tensor("point")}  # the loss is symmetric in x

    found = barrier(net, point(-1, 0), point(1, 0), align=align)
    assert seen == [([1.0, 0.0], [-1.0, 0.0])]
    assert found.aligned and found.barrier == pytest.approx(0.0, abs=1e-12)


def test_repair_gets_the_mixed_module_and_the_ends_and_is_what_is_measured() -> None:
    net = potential(bowl)
    alphas = []

    def repair(merged: nn.Module, a: nn.Module, b: nn.Module, alpha: float) -> nn.Module:
        torch.testing.assert_close(merged.point, (1 - alpha) * a.point + alpha * b.point)
        alphas.append(alpha)
        merged.point.data += 10
        return merged

    found = barrier(net, point(1, 0), point(0, 1), repair=repair)
    assert alphas == pytest.approx([i / 10 for i in range(1, 10)])
    assert found.losses[0] == 1 and found.losses[-1] == 5 and min(found.losses[1:-1]) > 500


def test_batchnorm_is_measured_anew_between_the_ends() -> None:
    train, _ = digits()
    nets = [trained(seed, 32, True) for seed in (1, 2)]
    recomputed = barrier(Network(nets[0], train), *nets)
    carried = barrier(Network(nets[0], train, norms="carry"), *nets)
    assert recomputed.ends == carried.ends
    assert recomputed.barrier < carried.barrier - 0.05
    # by hand: the middle, with statistics of one pass over the data in training mode
    middle = deepcopy(nets[0])
    state = {
        n: (v + nets[1].state_dict()[n]) / 2 if v.is_floating_point() else v
        for n, v in middle.state_dict().items()
    }
    middle.load_state_dict(state)
    torch.optim.swa_utils.update_bn(train[0].split(600), middle)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(middle.eval()(train[0]), train[1])
    assert recomputed.losses[5] == pytest.approx(float(loss), rel=1e-5)


def test_a_layer_that_two_models_share_has_no_barrier_and_all_layers_have_the_whole_one() -> None:
    train, _ = digits()
    a, b = trained(1), deepcopy(trained(2))
    b.layers[2].load_state_dict(a.layers[2].state_dict())
    net = Network(a, train)
    single = layerwise_barrier(net, a, b)
    assert single.layers == ("layers.0", "layers.1", "layers.2")
    assert single.from_a[2] == single.from_b[2] == single.random[2] == single.midpoint[2] == 0.0
    assert single.midpoint[0] > 0.05 and single.midpoint[0] > single.random[0]
    shallow, deep = (layerwise_barrier(net, a, b, sets=s) for s in ("shallow", "deep"))
    whole = barrier(net, a, b)
    assert shallow.from_a[-1] == deep.from_a[0] == pytest.approx(whole.barrier)
    assert shallow.from_b[-1] == deep.from_b[0] == pytest.approx(whole.barrier)
    # one layer by hand: a, and a with b's layer, are the ends
    swapped = {n: v if "layers.1" not in n else b.state_dict()[n] for n, v in a.state_dict().items()}
    assert single.from_a[1] == pytest.approx(barrier(net, a, swapped).barrier, abs=1e-6)
    assert shallow.from_a[0] == single.from_a[0] and deep.from_b[-1] == single.from_b[-1]


def test_the_random_step_is_as_long_as_the_way_to_the_midpoint() -> None:
    found = layerwise_barrier(potential(lambda x: x.square().sum()), point(0, 0), point(3, 4), group=str)
    assert found.random == pytest.approx((2.5**2,)) and found.midpoint == pytest.approx((2.5**2,))


def test_coordinates_of_a_plane_are_distances_in_weight_space() -> None:
    net = potential(lambda x: (x - torch.tensor([1.0, 1.0, 0.0], dtype=F64)).square().sum(), 3)
    found = loss_plane(net, [point(0, 0, 0), point(3, 0, 0), point(1, 2, 0)], points=9, margin=0.0)
    assert found.points == ((0.0, 0.0), (3.0, 0.0), (1.0, 2.0))
    for j, y in enumerate(found.ys):
        for i, x in enumerate(found.xs):
            assert found.losses[j][i] == pytest.approx((x - 1) ** 2 + (y - 1) ** 2, abs=1e-12)
    # tilted in space: the plane is spanned by the models, wherever they are
    turned = loss_plane(net, [point(0, 0, 1), point(0, 0, 3), point(0, 4, 1)], points=3, margin=0.0)
    assert turned.points[1:] == ((2.0, 0.0), (0.0, 4.0))
    assert turned.losses[2][2] == pytest.approx(1 + 9 + 9)


def test_no_plane_through_models_on_a_line_or_other_than_three() -> None:
    net = potential(bowl)
    with pytest.raises(UsageError, match="one line"):
        loss_plane(net, [point(0, 0), point(1, 1), point(2, 2)])
    with pytest.raises(UsageError, match="same weights"):
        loss_plane(net, [point(1, 1), point(1, 1), point(2, 0)])
    with pytest.raises(UsageError, match="three models, not 2"):
        loss_plane(net, [point(0, 0), point(1, 1)])


def test_a_random_plane_moves_every_filter_by_its_own_norm() -> None:
    from weft.analysis.space import filter_normalised, normal

    net = Network(trained(1), digits()[1])
    state = net.state(trained(1))
    made = filter_normalised(normal(state, net.parameters, 3), state)
    for name, d in made.items():
        if d.dim() < 2:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), state[name].flatten(1).norm(dim=1))
    found = random_plane(net, trained(1), points=5, radius=0.5)
    assert found.losses[2][2] == pytest.approx(net.measure(state).loss)
    assert found.losses[0][0] > found.losses[2][2]
    assert found == random_plane(net, trained(1), points=5, radius=0.5)


def test_a_trained_curve_bends_around_the_barrier_and_keeps_its_ends() -> None:
    net = potential(wells)
    found = connect(net, point(-1, 0), point(1, 0), steps=400, rate=0.05)
    assert found.losses[0] == found.losses[-1] == pytest.approx(0.0, abs=1e-12)
    assert max(found.chord) == pytest.approx(3.0, abs=1e-2)
    assert found.worst < 1.3  # the saddle is at 1
    assert found.length > 1.2
    assert found == connect(net, point(-1, 0), point(1, 0), steps=400, rate=0.05)


@pytest.mark.parametrize("kind", ["bezier", "polyline"])
def test_curves_are_affine_combinations_with_the_right_length(kind: str) -> None:
    for i in range(21):
        assert sum(coefficients(i / 20, kind)) == pytest.approx(1.0)  # type: ignore[arg-type]
    found = along(potential(bowl), point(0, 0), point(1, 2), point(2, 0), kind=kind)  # type: ignore[arg-type]
    parabola = (
        2 * (2**2 + 1) ** 0.5 / 2
        if kind == "polyline"
        else (5**0.5 + float(torch.tensor(2.0).asinh()) / 2) / 2
    )
    assert found.length == pytest.approx(parabola, rel=1e-3)


def test_the_elastic_band_finds_the_saddle() -> None:
    found = elastic_path(potential(wells), point(-1, 0), point(1, 0), pivots=7, steps=60, rate=0.05)
    assert found.saddle == pytest.approx(1.0, abs=1e-2)
    assert max(found.chord) > 2.9 and found.pivots >= 7
    steps = [(b["point"] - a["point"]).norm() for a, b in zip(found.states, found.states[1:])]
    assert max(steps) < 1.7 * min(steps)  # near equal: a pivot may have been put in last


def test_a_path_along_a_valley_without_barrier_stays_where_it_is() -> None:
    found = elastic_path(
        potential(lambda x: x[1] ** 2), point(-1, 0), point(1, 0), pivots=3, steps=5, rounds=2
    )
    assert (
        found.saddle == pytest.approx(0.0, abs=1e-20)
        and found.length == pytest.approx(1.0)
        and found.pivots == 3
    )


def test_a_network_of_another_shape_and_weights_that_are_not_finite_are_told_of_by_name() -> None:
    train, _ = digits()
    net = Network(trained(1), train)
    with pytest.raises(DataError, match=r"layers\.1\.weight"):
        barrier(net, trained(1), Mlp((64, 20, 20, 10), 0))
    bad = trained(1).state_dict() | {"layers.1.bias": torch.full((48,), float("nan"))}
    with pytest.raises(DataError, match=r"layers\.1\.bias: 48 of 48"):
        barrier(net, trained(1), bad)
    with pytest.raises(UsageError, match="at least 11"):
        barrier(net, trained(1), trained(2), points=5)


def test_spawned_models_are_connected_and_independent_ones_are_not() -> None:
    train, _ = digits()
    start = fit(Mlp((64, 48, 48, 10), 5), train, epochs=3)
    pair = [fit(deepcopy(start), train, seed=seed, epochs=6) for seed in (1, 2)]
    net = Network(start, train)
    assert barrier(net, *pair).barrier < 0.02
    assert barrier(net, trained(1), trained(2)).barrier > 0.3
