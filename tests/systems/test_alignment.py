"""Section 2.2.2.3: networks of independent starts brought into one order, on real digits.

Three hidden layers of 64 units, trained with weight decay from three seeds: their averages are at chance.
"""

from __future__ import annotations

import pytest
import torch
from lab import UPRIGHT
from torch import Tensor, nn

import weft
from weft.align import PermutationSpec, discover, relating
from weft.align.annealing import annealed
from weft.align.many import c2m3, mean, merge_many, shared
from weft.align.sinkhorn import sinkhorn_matching
from weft.align.soft import softened
from weft.align.straight import straight_through
from weft.align.weights import weight_matching
from weft.analysis.barrier import Barrier, barrier
from weft.analysis.network import Measured, Network
from weft.demo.tasks import examples
from weft.demo.train import joined

SEEDS = (1, 2, 3)
PAIRS = ((1, 2), (2, 3), (3, 1))
TRAIN = joined([examples(UPRIGHT, "pretrain"), examples(UPRIGHT, "train")])
TEST = examples(UPRIGHT, "test")
Permutations = dict[str, Tensor]


def trained(seed: int, width: int = 64, epochs: int = 20, rate: float = 2e-3) -> nn.Sequential:
    """A network of its own start and its own order of data."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    net, n = nn.Sequential(*layers, nn.Linear(width, 10)), len(TRAIN[0])
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * (n // 100), pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(n)[: n // 100 * 100].split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(TRAIN[0][batch]), TRAIN[1][batch]).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


@pytest.fixture(scope="module")
def nets() -> dict[int, nn.Sequential]:
    return {s: trained(s) for s in SEEDS}


@pytest.fixture(scope="module")
def spec(nets: dict[int, nn.Sequential]) -> PermutationSpec:
    return discover(nets[1])


@pytest.fixture(scope="module")
def matched(nets: dict[int, nn.Sequential], spec: PermutationSpec) -> dict[tuple[int, int], Permutations]:
    """Pairs by weight matching."""
    return {(i, j): weight_matching(spec, nets[i], nets[j]) for i, j in PAIRS}


def found(
    nets: dict[int, nn.Sequential], spec: PermutationSpec, pair: tuple[int, int], p: Permutations
) -> Barrier:
    """The barrier on data that nothing was chosen by."""
    a, b = (nets[i] for i in pair)
    return barrier(Network(a, TEST), a, b, align=lambda b, a: spec.apply(b, p))


def averaged(nets: dict[int, nn.Sequential], spec: PermutationSpec, orders: list[Permutations]) -> Measured:
    net = Network(nets[1], TEST)
    return net.measure(
        net.state(mean([spec.apply(n, p) for n, p in zip(nets.values(), orders, strict=True)]))
    )


def test_weight_matching_removes_most_of_the_barrier_without_data(
    nets: dict[int, nn.Sequential], spec: PermutationSpec, matched: dict[tuple[int, int], Permutations]
) -> None:
    for pair, p in matched.items():
        before, after = found(nets, spec, pair, {}), found(nets, spec, pair, p)
        assert before.barrier > 1 and before.error_barrier > 0.4  # type: ignore[operator]
        assert after.barrier < 0.2 * before.barrier and after.error_barrier < 0.08  # type: ignore[operator]


def test_the_straight_through_estimator_goes_below_the_matching_that_it_starts_from(
    nets: dict[int, nn.Sequential], spec: PermutationSpec, matched: dict[tuple[int, int], Permutations]
) -> None:
    start, end = 0.0, 0.0
    for i, j in PAIRS:
        net = Network(nets[i], TRAIN, batch_size=128)
        p = straight_through(spec, nets[i], nets[j], net)
        states = [net.state(mean([weft.load(nets[i]), spec.apply(nets[j], q)])) for q in (p, matched[i, j])]
        assert net.measure(states[0]).loss < net.measure(states[1]).loss
        start += found(nets, spec, (i, j), matched[i, j]).barrier
        end += found(nets, spec, (i, j), p).barrier
    assert end < start


def test_sinkhorn_re_basin_learns_permutations_by_gradient(
    nets: dict[int, nn.Sequential], spec: PermutationSpec
) -> None:
    for pair in PAIRS[:2]:
        a, b = (nets[i] for i in pair)
        before = found(nets, spec, pair, {}).barrier
        by_weights = sinkhorn_matching(spec, a, b, steps=50)
        by_loss = sinkhorn_matching(
            spec, a, b, Network(a, TRAIN, batch_size=256), objective="midpoint", steps=50
        )
        assert found(nets, spec, pair, by_weights).barrier < 0.2 * before
        assert found(nets, spec, pair, by_loss).barrier < 0.2 * before


def test_annealing_shows_that_most_of_the_barrier_is_a_matter_of_order(
    nets: dict[int, nn.Sequential], spec: PermutationSpec
) -> None:
    a, b = nets[1], nets[2]
    p = annealed(spec, a, b, Network(a, TRAIN), steps=400)
    before, after = found(nets, spec, (1, 2), {}), found(nets, spec, (1, 2), p)
    assert after.barrier < 0.6 * before.barrier
    assert after.error_barrier < 0.25 * before.error_barrier  # type: ignore[operator]


def test_merge_many_brings_three_strangers_into_one_basin(
    nets: dict[int, nn.Sequential], spec: PermutationSpec
) -> None:
    orders = merge_many(spec, list(nets.values()))
    plain, merged = averaged(nets, spec, [{}, {}, {}]), averaged(nets, spec, orders)
    assert plain.error > 0.7 and merged.error < 0.2  # type: ignore[operator]
    assert merged.loss < 0.4 * plain.loss


def test_c2m3_agrees_around_every_cycle_and_merges_better(
    nets: dict[int, nn.Sequential], spec: PermutationSpec, matched: dict[tuple[int, int], Permutations]
) -> None:
    def around(one: Permutations, two: Permutations, three: Permutations) -> float:
        """The share of units that come back to themselves on the way 1 → 3 → 2 → 1."""
        turned = spec.compose(spec.compose(three, two), one)
        eye = spec.identity()
        return sum(float((turned[n] == eye[n]).double().mean()) for n in eye) / len(eye)

    orders = dict(zip(SEEDS, c2m3(spec, list(nets.values())), strict=True))
    assert around(*(relating(spec, orders[i], orders[j]) for i, j in PAIRS)) == 1.0
    assert around(*matched.values()) < 0.5  # pairwise matchings do not know of one another
    states = [{n: t.double() for n, t in net.state_dict().items()} for net in nets.values()]

    def f(of: list[Permutations]) -> float:
        return float(shared(spec, states, [softened(spec, p, torch.float64) for p in of]))

    to_one = [spec.identity(), *(weight_matching(spec, nets[1], nets[i]) for i in SEEDS[1:])]
    assert f(list(orders.values())) > f(to_one)
    ours, theirs = averaged(nets, spec, list(orders.values())), averaged(nets, spec, to_one)
    assert ours.loss < theirs.loss
