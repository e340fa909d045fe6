"""Section 2.2.3.2, by statistics: Fisher, Fisher-nodes, MaTS, gradient matching and activation-informed merging.

Statistics come from 128 training images a task, accuracies from the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from lab import UPRIGHT, World, average, score

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import as_network
from weft.demo.tasks import examples

SAMPLES = 128
SIZE, BASE_SIZE = 550, 500
"""How many images the experts and the base were trained on."""


@dataclass(frozen=True)
class Known:
    """A world, and what was measured of its models."""

    world: World
    statistics: Sequence[Checkpoint]
    of_base: Checkpoint

    def merged(self, method: str, base: bool = True, **more: object) -> Checkpoint:
        anchor = self.world.base if base else None
        return weft.merge(self.world.all, method, base=anchor, statistics=self.statistics, **more)  # type: ignore[arg-type]

    def score(self, model: object) -> float:
        return average(model, list(self.world.experts))  # type: ignore[arg-type]

    @property
    def averaged(self) -> float:
        return self.score(weft.merge(self.world.all, "linear"))


@pytest.fixture(scope="module")
def known(worlds: list[World]) -> list[Known]:
    made = []
    for world in worlds:
        stats = [
            weft.measure(as_network(m), [examples(t, "train")], ("fisher", "kfac", "gram", "node"),
                         samples=SAMPLES, labels="exact")
            for t, m in world.experts.items()
        ]  # fmt: skip
        upright = [examples(UPRIGHT, "pretrain")]
        of_base = weft.measure(
            as_network(world.base), upright, ("fisher", "abs_mean"), samples=SAMPLES, labels="exact"
        )
        made.append(Known(world, stats, of_base))
    return made


def test_fisher_information_says_whose_weights_to_take(known: list[Known]) -> None:
    for one in known:
        assert one.score(one.merged("fisher", base=False)) > one.averaged + 0.05


def test_fisher_information_of_masks_improves_the_average_for_less(known: list[Known]) -> None:
    for one in known:
        assert one.score(one.merged("fisher_nodes", base=False)) > one.averaged + 0.01
        kept = {k: sum(s.info(n).numel for n in s if n.startswith(k)) for s in one.statistics[:1]
                for k in ("node/", "fisher/")}  # fmt: skip
        assert kept["node/"] * 50 < kept["fisher/"]


def test_matching_in_task_subspaces_beats_averaging_by_the_diagonal(known: list[Known]) -> None:
    for one in known:
        diagonal = one.score(one.merged("fisher", base=False))
        arithmetic = max(
            one.score(weft.merge(one.world.all, "task_arithmetic", base=one.world.base, scale=s))
            for s in (0.3, 0.5, 0.7, 1.0)
        )
        matched = one.score(one.merged("mats"))
        assert matched > max(diagonal, arithmetic)
        experts = sum(score(m, t) for t, m in one.world.experts.items()) / len(one.world.experts)
        assert matched > experts - 0.03
        # what the conjugate gradients begin with is task arithmetic; each step is worth something
        few = one.score(one.merged("mats", iterations=3))
        assert one.score(one.merged("mats", iterations=0)) < few < matched


def test_regression_on_inputs_needs_no_labels_and_comes_close_to_the_experts(known: list[Known]) -> None:
    """RegMean from inputs alone: far above the average and Fisher information; off-diagonals do it."""
    for one in known:
        experts = sum(score(m, t) for t, m in one.world.experts.items()) / len(one.world.experts)
        fitted = one.score(one.merged("regmean", base=False))
        assert fitted > one.averaged + 0.1
        assert fitted > one.score(one.merged("fisher", base=False)) + 0.02
        assert fitted > experts - 0.06
        assert fitted > one.score(one.merged("regmean", base=False, off_diagonal=0.1)) + 0.01
        # LOT, the same without shrinking; data-free kin come close
        assert one.score(one.merged("lot")) > experts - 0.05
        assert one.score(weft.merge(one.world.all, "swudi_a", base=one.world.base)) > experts - 0.08


def test_task_vectors_disturb_each_other_less_when_trimmed_by_what_the_others_see(known: list[Known]) -> None:
    """CAT Merging, against the plain sum."""
    gains = []
    for one in known:
        for scale in (0.5, 1.0):
            plain = one.score(weft.merge(one.world.all, "task_arithmetic", base=one.world.base, scale=scale))
            gains.append(one.score(one.merged("cat", scale=scale)) - plain)
    assert min(gains) > -0.002 and sum(gains) / len(gains) > 0.01 and max(gains) > 0.05


def test_inputs_that_the_merged_model_makes_are_the_better_ones(known: list[Known]) -> None:
    """RegMean++ is not below RegMean and above it on average; IterIS is above both."""
    gains, further = [], []
    for one in known:
        nets = [as_network(m) for m in one.world.all]
        data = [[examples(t, "train")[0][:SAMPLES]] for t in one.world.experts]
        plain = one.score(one.merged("regmean", base=False, off_diagonal=1.0))
        grown = one.score(weft.regmean_pp(nets, data, off_diagonal=1.0))
        gains.append(grown - plain)
        further.append(one.score(weft.iteris(nets, data, rounds=3)) - plain)
    assert min(gains) > -0.003 and sum(gains) > 0
    assert min(further) > 0 and sum(further) > sum(gains)


def test_gradient_matching_needs_no_scale(known: list[Known]) -> None:
    """The Hessian of the whole loss: sizes and the base's own term count, and a large δ gives Σ τ back."""
    for one in known:
        full = one.merged("ubgm", base_statistics=one.of_base, size=SIZE, base_size=BASE_SIZE)
        assert one.score(full) > one.averaged + 0.1
        assert one.score(full) > one.score(one.merged("fisher", base=False))
        alone = one.score(weft.merge(one.world.all, "task_arithmetic", base=one.world.base, scale=1.0))
        assert one.score(one.merged("ubgm", size=1, delta=1.0)) == pytest.approx(alone, abs=0.02)
    shipped = known[0]  # five tasks: the plain sum has gone too far
    plain = weft.merge(shipped.world.all, "task_arithmetic", base=shipped.world.base, scale=1.0)
    full = shipped.merged("ubgm", base_statistics=shipped.of_base, size=SIZE, base_size=BASE_SIZE)
    assert shipped.score(full) > shipped.score(plain) + 0.1


def test_gradient_matching_removes_a_task(known: list[Known]) -> None:
    """A negative weight forgets more than −τ does; gains are bounded, so the base's own task survives."""
    for one in known:
        task, expert = next(iter(one.world.experts.items()))
        removed = weft.merge(
            [expert], "ubgm", base=one.world.base, weight=-1.0, size=SIZE, base_size=10 * BASE_SIZE,
            statistics=one.statistics[:1], base_statistics=one.of_base,
        )  # fmt: skip
        negated = weft.merge([expert], "task_arithmetic", base=one.world.base, scale=-1.0)
        assert score(removed, task) < score(negated, task) - 0.05 < score(one.world.base, task)
        assert score(removed, UPRIGHT) > 0.8


def test_sparing_salient_channels_keeps_what_the_base_knows(known: list[Known]) -> None:
    for one in known:

        def made(omega: float, w: World = one.world, s: Checkpoint = one.of_base) -> Checkpoint:
            return weft.merge(w.all, "aim", base=w.base, base_statistics=s, omega=omega)

        plain = made(1.0)
        kept = [score(made(omega), UPRIGHT) for omega in (1.0, 0.4, 0.2)]
        assert kept[0] + 0.08 < kept[1] < kept[2]
        assert one.score(made(0.4)) > one.score(plain) - 0.01
