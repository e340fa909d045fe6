"""Section 2.2.4 and the analyses of 2.2.2.3, on real digits, three seeds each; and the output ensemble."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from lab import UPRIGHT, Data, tuned
from torch import Tensor, nn

from weft.analysis.barrier import Barrier, barrier
from weft.analysis.curves import along, connect
from weft.analysis.decomposition import bias_variance
from weft.analysis.disentanglement import disentanglement
from weft.analysis.ensemble import Ensemble, ensemble_gap
from weft.analysis.layerwise import layerwise_barrier
from weft.analysis.least_squares import tail_averaging
from weft.analysis.linearity import feature_linearity
from weft.analysis.neb import elastic_path
from weft.analysis.network import Network
from weft.analysis.ntk import ntk_localisation
from weft.analysis.sharpness import sharpness
from weft.analysis.space import mean
from weft.analysis.stability import sgd_stability
from weft.demo.network import DigitNet
from weft.demo.tasks import examples
from weft.demo.train import joined

Bases = dict[int, DigitNet]
TRAIN, TEST = examples(UPRIGHT, "pretrain"), examples(UPRIGHT, "test")


def other(bases: Bases, seed: int) -> DigitNet:
    """A base of another initialisation."""
    return bases[seed % len(bases) + 1]


@pytest.fixture(scope="module")
def spawned(bases: Bases) -> dict[int, list[DigitNet]]:
    """Two runs with different data order from each base."""
    data = examples(UPRIGHT, "train")
    return {
        s: [tuned(b, data, 10 * s + i, epochs=6, rate=1e-3, head=True) for i in (0, 1)]
        for s, b in bases.items()
    }


@pytest.fixture(scope="module")
def pairs(bases: Bases) -> dict[int, list[DigitNet]]:
    """Two experts fine-tuned from each base for different tasks."""
    tasks = ("rotated", "mirrored")
    return {s: [tuned(b, examples(t, "train"), 10 * s + i, epochs=12) for i, t in enumerate(tasks)]
            for s, b in bases.items()}  # fmt: skip


def test_an_ensemble_is_an_upper_reference_that_averages_of_strangers_do_not_reach(bases: Bases) -> None:
    ensembles, singles = [], []
    for seed, base in bases.items():
        models = [base, other(bases, seed)]
        found = ensemble_gap(Network(base, TEST), models)
        assert found.losses[3] < sum(found.losses[:2]) / 2
        assert found.errors[2] > found.errors[3] + 0.3  # type: ignore[operator]
        ensembles.append(found.errors[3])
        singles.append(found.errors[0])
        with torch.inference_mode():
            mixed = Ensemble(models)(TEST[0]).exp()
            expected = torch.stack([m(TEST[0]).softmax(1) for m in models]).mean(0)
        torch.testing.assert_close(mixed, expected)
    assert sum(ensembles) <= sum(singles)  # type: ignore[arg-type]


def test_runs_from_one_start_are_connected_and_independent_ones_are_not(
    bases: Bases, spawned: dict[int, list[DigitNet]]
) -> None:
    for seed, base in bases.items():
        net = Network(base, TEST)
        near: Barrier = barrier(net, *spawned[seed])
        far = barrier(net, base, other(bases, seed))
        assert near.barrier < 0.01 and near.instability < 0.02 and near.error_barrier < 0.01  # type: ignore[operator]
        assert far.barrier > 1.0 and far.error_barrier > 0.3  # type: ignore[operator]


def test_single_layers_of_independent_networks_make_almost_no_barrier(bases: Bases) -> None:
    for seed, base in bases.items():
        net = Network(base, TEST)
        single = layerwise_barrier(net, base, other(bases, seed))
        shallow = layerwise_barrier(net, base, other(bases, seed), sets="shallow")
        assert len(single.layers) == 4
        assert max(*single.from_a, *single.from_b) < 0.25
        assert shallow.from_a[-1] > 1.0
        # the direction to the other model is special: a random step of that length does far less harm
        assert all(m > r for m, r in zip(single.midpoint, single.random, strict=True))


def test_features_are_linear_exactly_where_weights_are_connected(
    bases: Bases, spawned: dict[int, list[DigitNet]]
) -> None:
    for seed, base in bases.items():
        net = Network(base, TEST)
        near = feature_linearity(net, spawned[seed])
        far = feature_linearity(net, [base, other(bases, seed)])
        assert min(near.cosine) > 0.999 and min(near.scale) > 0.99
        assert near.cosine > near.baseline
        assert min(far.cosine) < 0.5 and min(far.scale) < 0.2
        assert far.scale[0] > far.scale[1] > far.scale[2] > far.scale[3]  # the collapse deepens with depth


def test_features_of_experts_for_different_tasks_add_up_and_of_strangers_do_not(
    bases: Bases, pairs: dict[int, list[DigitNet]]
) -> None:
    data = joined([examples(t, "test") for t in ("rotated", "mirrored")])
    for seed, base in bases.items():
        net = Network(base, data)
        stranger = tuned(other(bases, seed), examples("rotated", "train"), 1, epochs=4)
        near = feature_linearity(net, pairs[seed])
        assert (
            min(near.cosine) > 0.99 and min(near.scale) > 0.98 and near.cosine[-1] > near.baseline[-1] + 0.1
        )
        assert min(feature_linearity(net, [stranger, pairs[seed][1]]).cosine) < 0.6
        arithmetic = feature_linearity(net, [base, *pairs[seed]], [1 - 2 * 0.4, 0.4, 0.4])
        assert min(arithmetic.cosine) > 0.99


def test_a_curve_goes_around_the_barrier_also_on_test_data(bases: Bases) -> None:
    for seed, base in bases.items():
        a, b = base, other(bases, seed)
        net, tested = Network(base, TRAIN), Network(base, TEST)
        found = connect(net, a, b, steps=120, seed=seed)
        on_test = along(tested, tested.state(a), found.control, tested.state(b), points=21)
        assert max(found.chord) > 1.5 and found.worst < 0.1 * max(found.chord)
        assert max(on_test.errors) < 0.1  # type: ignore[type-var, operator]
        assert max(on_test.chord) > 1.5


def test_the_elastic_band_stays_below_a_third_of_the_barrier(bases: Bases) -> None:
    for seed in (1, 2):
        a, b = bases[seed], other(bases, seed)
        found = elastic_path(Network(a, TRAIN), a, b, pivots=5, rounds=3, steps=10)
        assert max(found.chord) > 1.5
        assert found.saddle < max(found.chord) / 3
        assert 1.0 < found.length < 1.1


def noisy_run(start: DigitNet, seed: int) -> tuple[list[dict[str, Tensor]], Data]:
    """The last iterates of SGD on labels of which a fifth are noise, so that it never settles; and its data."""
    generator = torch.Generator().manual_seed(seed)
    x, y = examples("rotated", "train")
    flip = torch.rand(len(y), generator=generator) < 0.2
    y = torch.where(flip, torch.randint(10, y.shape, generator=generator), y)
    net = deepcopy(start).train().requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    kept = []
    for step in range(300):
        batch = torch.randint(len(x), (10,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        if step >= 180 and step % 10 == 9:
            kept.append({n: t.detach().clone() for n, t in net.state_dict().items()})
    return kept, (x, y)


def test_the_average_of_a_noisy_run_is_flatter_than_its_last_iterate(bases: Bases) -> None:
    for seed, base in bases.items():
        iterates, data = noisy_run(base, seed)
        net = Network(base, data)
        average = mean(net.states(iterates))
        last, swa = (
            sharpness(net, m, probes=2, steps=10, radius=0.5, samples=2) for m in (iterates[-1], average)
        )
        assert swa.eigenvalues[0] < 0.8 * last.eigenvalues[0]
        assert swa.sam < 0.6 * last.sam
        assert swa.loss < last.loss


def test_tails_of_sgd_on_least_squares_are_near_efficient_and_iterates_are_not() -> None:
    found = tail_averaging([1.0] * 10, noise=0.5, rate=0.05, steps=[1000, 2000, 4000, 8000, 16000])
    assert found.slope == pytest.approx(-1.0, abs=0.05)
    assert max(found.last) < 1.05 * min(found.last)  # the last iterate stays at its noise
    for tail, floor, last in zip(found.tail, found.floor, found.last, strict=True):
        assert floor < tail < 1.4 * floor and tail < last / 5
    # what the squared inputs add to the noise at this step: the limit of tail over floor
    limit = 1 + 11 * 0.05 / (2 - 0.05 * 12)
    assert found.tail[-1] / found.floor[-1] == pytest.approx(limit, rel=0.01)
    free = tail_averaging([1.0] * 10, noise=0.0, rate=0.05, steps=[100, 200, 400])
    # the burn-in's exponential: 50, then 100 more steps of it
    assert free.tail[0] > 30 * free.tail[1] and free.tail[1] > 1e3 * free.tail[2]


def parity() -> Data:
    x, y = examples(UPRIGHT, "train")
    return x[:200], y[:200] % 2


@pytest.mark.parametrize("steps", [100, 400, 1600])
def test_a_replaced_example_moves_sgd_by_less_than_the_bound(steps: int) -> None:
    found = sgd_stability(*parity(), steps=steps, replicas=48, windows=[1, steps])
    assert all(d <= b for d, b in zip(found.distance, found.bound, strict=True))
    assert found.distance[1] <= found.distance[0]
    assert found.bound[1] == pytest.approx(found.bound[0] / 2, rel=0.02)
    assert max(found.loss_change) <= found.lipschitz * 10 * max(found.distance)


def test_more_data_make_sgd_more_stable() -> None:
    x, y = examples(UPRIGHT, "train")
    found = [sgd_stability(x[:n], y[:n] % 2, steps=300, replicas=48).distance[0] for n in (50, 150, 450)]
    assert found[0] > 1.5 * found[1] > 2 * found[2]


def test_longer_windows_are_more_stable_however_the_examples_are_drawn() -> None:
    for sampling in ("replacement", "permutation"):
        found = sgd_stability(*parity(), steps=600, replicas=48, sampling=sampling)  # type: ignore[arg-type]
        assert list(found.windows) == sorted(found.windows) and found.windows[-1] == 600
        # early in a window of few iterates the means are as far apart as the last ones; over the run they are not
        assert found.distance[-1] < 0.9 * found.distance[0]
        assert all(b <= 1.02 * a for a, b in zip(found.distance, found.distance[1:], strict=False))
        assert all(d <= b for d, b in zip(found.distance, found.bound, strict=True))


def test_the_error_of_an_average_is_bias_variance_covariance_and_locality(bases: Bases) -> None:
    data = examples("rotated", "train")
    draws = [[tuned(b, data, 100 * s + i, epochs=5, rate=r) for i, r in enumerate((1e-3, 5e-4, 2e-3))]
             for s, b in bases.items()]  # fmt: skip
    net = Network(bases[1], examples("rotated", "test"))
    found = bias_variance(net, draws)
    m = found.members
    assert (found.draws, m) == (3, 3)
    assert found.bias + found.variance / m + (m - 1) / m * found.covariance == pytest.approx(
        found.ensemble, abs=1e-10
    )
    assert found.covariance < found.variance and found.ensemble < found.single
    # runs from one start are near one another: the average is their ensemble, and better than one of them
    assert abs(found.gap) < 0.1 * found.ensemble  # type: ignore[arg-type]
    assert found.average < found.single  # type: ignore[operator]
    strangers = bias_variance(net, [[tuned(b, data, s, epochs=2) for s, b in bases.items()]])
    assert strangers.locality > 100 * found.locality  # type: ignore[operator]
    assert strangers.gap > 0.3 > 0.0 > strangers.ensemble - strangers.single


def test_experts_of_one_base_are_disentangled_and_strangers_are_not(
    bases: Bases, pairs: dict[int, list[DigitNet]]
) -> None:
    grid = [0.0, 0.5, 1.0, 2.0]
    for seed, base in bases.items():
        nets = [Network(base, examples(t, "test")) for t in ("rotated", "mirrored")]
        found = disentanglement(nets, base, pairs[seed], alphas=grid)
        assert found.error[0][0] == 0.0
        assert found.mean < 0.25 and found.error[3][3] > found.error[2][2]
        stranger = tuned(other(bases, seed), examples("rotated", "train"), 1, epochs=4)
        assert disentanglement(nets, base, [stranger, pairs[seed][1]], alphas=grid).mean > 2 * found.mean


def test_eigenfunctions_are_more_local_between_tasks_than_within_one(bases: Bases) -> None:
    for base in bases.values():
        nets = {t: Network(base, tuple(v[:40] for v in examples(t, "test"))) for t in ("rotated", "inverted")}
        x, y = nets["rotated"].batches[0]
        halves = [Network(base, (x[i::2], y[i::2])) for i in (0, 1)]
        between = ntk_localisation(nets["rotated"], nets["inverted"], base)
        within = ntk_localisation(*halves, base)
        assert between.localisation > 2 * within.localisation
        assert sum(between.energy) == pytest.approx(40) and between.share == 0.5
        # digits of which only the left, or only the right half is shown share no input: a linear net is local
        side = torch.arange(64).reshape(8, 8)[:, :4].flatten()
        left, right = torch.zeros_like(x), x.clone()
        left[:, side], right[:, side] = x[:, side], 0.0
        linear = nn.Linear(64, 10, bias=False)
        apart = ntk_localisation(Network(linear, (left, y)), Network(linear, (right, y)), linear)
        assert apart.localisation == pytest.approx(1.0, abs=1e-3)


def test_labels_align_with_the_kernel_better_after_training_than_before(bases: Bases) -> None:
    halves = [(TEST[0][i : i + 40], TEST[1][i : i + 40]) for i in (0, 40)]
    for seed, base in bases.items():
        nets = [Network(base, h) for h in halves]
        fresh = DigitNet(torch.Generator().manual_seed(100 + seed))
        trained, untrained = (ntk_localisation(*nets, m).alignment for m in (base, fresh))
        assert all(a > b for a, b in zip(trained, untrained, strict=True))  # type: ignore[operator]
