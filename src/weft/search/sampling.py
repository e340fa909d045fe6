"""Where candidates come from: Optuna's samplers, a grid, start values, and CMA-ES that can be resumed.

Every proposal is a function of the finished trials, the seed and its own number. So a search that was
interrupted goes on exactly as it would have, and no sampler's state is stored. (Optuna's CMA-ES stores its
state as a pickle in the database and executes it when it resumes; weft's does not.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import MissingExtra, UsageError, did_you_mean
from weft.search.space import Space

SAMPLERS = ("tpe", "cmaes", "gp", "nsga2", "random", "grid")
GENERATION = "generation"
"""The trial attribute that says to which generation of CMA-ES a candidate belongs."""


@dataclass(frozen=True)
class Sampler:
    """Which way of choosing, and its knobs; None means its default."""

    name: str = "tpe"
    startup: int | None = None
    """Random candidates before tpe and gp begin to model; 10."""
    population: int | None = None
    """Candidates a generation: 4 + ⌊3 ln D⌋ for cmaes, 50 for nsga2."""
    sigma: float | None = None
    """First standard deviation of cmaes as a share of each range; 1/6."""

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            hint = did_you_mean(self.name, SAMPLERS) or f"; there are {', '.join(SAMPLERS)}"
            raise UsageError(f"there is no sampler {self.name!r}{hint}")
        used = {"startup": ("tpe", "gp"), "population": ("cmaes", "nsga2"), "sigma": ("cmaes",)}
        for knob, users in used.items():
            value = getattr(self, knob)
            if value is not None and self.name not in users:
                raise UsageError(f"sampler {self.name} has no {knob}; {' and '.join(users)} have it")
            if value is not None and (value <= 0 or (knob == "population" and value < 2)):
                raise UsageError(f"{knob} must be {'at least 2' if knob == 'population' else 'positive'}")

    def check(self, space: Space, objectives: int) -> None:
        """UsageError where this sampler cannot search this space."""
        if self.name != "cmaes":
            return
        if objectives > 1:
            raise UsageError("cmaes has one objective; use nsga2, tpe or gp for several")
        if not space.numeric or space.conditional:
            raise UsageError("cmaes searches numbers only: choose the words beforehand, or use tpe")
        if len(space.axes) < 2:
            raise UsageError("cmaes needs two numbers at least; use gp, tpe or a grid for one")

    def of_optuna(self, space: Space, seed: int, jobs: int) -> Any:
        """The Optuna sampler for one proposal."""
        import optuna

        if self.name == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=self.startup or 10, multivariate=True,
                group=space.conditional, constant_liar=jobs > 1,
            )  # fmt: skip
        if self.name == "gp":
            try:
                import scipy.optimize  # noqa: F401
            except ImportError:
                raise MissingExtra("scipy", "search", "the gp sampler") from None
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=self.startup or 10)
        if self.name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=self.population or 50)
        return optuna.samplers.RandomSampler(seed=seed)


def derived_seed(seed: int, number: int) -> int:
    """An independent seed for every proposal."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=4).digest(), "little")


class Cma:
    """CMA-ES on the unit cube (Hansen, arXiv:1604.00772), rebuilt from the trials it has proposed.

    A candidate that was refused ranks last in its generation. Candidates beyond a generation's size, which
    parallel jobs ask for, belong to it and are not learned from.
    """

    def __init__(self, how: Sampler, space: Space, seed: int, maximize: bool) -> None:
        try:
            import numpy as np
            from cmaes import CMA
        except ImportError:
            raise MissingExtra("cmaes", "search", "the cmaes sampler") from None
        n = len(space.axes)
        self.space, self.seed, self.sign = space, seed, -1.0 if maximize else 1.0
        self.cma = CMA(
            mean=np.full(n, 0.5), sigma=how.sigma or 1 / 6, bounds=np.tile([0.0, 1.0], (n, 1)),
            seed=derived_seed(seed, -1), population_size=how.population or 4 + math.floor(3 * math.log(n)),
        )  # fmt: skip

    def propose(self, trials: Sequence[Any], number: int) -> tuple[dict[str, Any], int]:
        """The point of trial `number`, and its generation, given the study's trials."""
        import numpy as np

        finished = [t for t in trials if t.state.is_finished() and GENERATION in t.user_attrs]
        while True:
            now = self.cma.generation
            own = [t for t in finished if t.user_attrs[GENERATION] == now][: self.cma.population_size]
            if len(own) < self.cma.population_size:
                break
            self.cma.tell([(self._unit(t.params), self._rank(t)) for t in own])
        self.cma.reseed_rng(derived_seed(self.seed, number))
        point = np.clip(self.cma.ask(), 0.0, 1.0)
        return {a.name: a.from_unit(float(u)) for a, u in zip(self.space.axes, point, strict=True)}, now

    def _unit(self, params: dict[str, Any]) -> Any:
        import numpy as np

        return np.array([a.to_unit(params[a.name]) for a in self.space.axes])

    def _rank(self, trial: Any) -> float:
        return math.inf if trial.values is None else self.sign * float(trial.values[0])
