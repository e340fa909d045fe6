"""What is compared: every method of the registry, and what merges by learning, as one kind of thing.

A contender makes an `Outcome` of a `Setting`: one set of weights, one a task, or a module. Its row says what it has
seen: nothing, inputs without labels, labels, or the test inputs themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from weft.bench.setting import Setting, State
from weft.errors import UsageError, did_you_mean
from weft.methods.registry import METHODS, Method

Seen = Literal["none", "unlabelled", "labelled", "test-time"]
Params = Mapping[str, Any]

SUMS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Scales to try where task vectors are added up."""
MEANS = (0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Scales to try where they are averaged, mostly dropped, or made as long as one of them."""


@dataclass(frozen=True)
class Outcome:
    """What a contender made: exactly one of the four."""

    state: State | None = None
    states: Mapping[str, State] | None = None
    """One model a task: the task must be known when it is used."""
    module: nn.Module | None = None
    """A module that runs by itself, such as a router; `parameters` says how large it is."""
    modules: Mapping[str, nn.Module] | None = None
    """One module a task, for what weights cannot hold."""
    parameters: float | None = None
    """Numbers kept at inference, in units of 32 bits; by default those of one model, or of one a task."""
    extra_seconds: float = 0.0
    """Measured before, for several contenders: the statistics."""


def fits_always(setting: Setting) -> str:
    return ""


@dataclass(frozen=True)
class Contender:
    """One row of the table, or two: as published, and tuned on the validation split."""

    name: str
    label: str
    make: Callable[[Setting, Params], Outcome]
    family: str
    seen: Seen = "none"
    params: Params = field(default_factory=dict)
    """What is published and fixed, where it is not the method's default."""
    tuned: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """One parameter and the values among which validation chooses."""
    needs_base: bool = False
    per_task: bool = False
    models: tuple[int, int | None] = (1, None)
    fits: Callable[[Setting], str] = fits_always
    """Why it cannot run on a suite, or an empty string."""


EXCLUDED = {
    "nuslerp", "nearswap", "arcee_fusion", "multislerp",  # like slerp or karcher, or without a default
    "passthrough", "wise_ft", "expo",  # of one model
    "breadcrumbs_ties", "della_linear", "dare", "ram", "core_space", "magnitude", "subspace_boosting",
}  # fmt: skip
"""Methods of the registry that are no contenders of their own, or near twins of one."""

FAMILIES = {
    "linear": "average", "slerp": "average", "karcher": "average", "model_stock": "average",
    "task_arithmetic": "elementwise",
    "ties": "elementwise", "dare_ties": "elementwise", "breadcrumbs": "elementwise", "della": "elementwise",
    "pcb": "elementwise", "magmax": "elementwise", "sce": "elementwise", "consensus": "elementwise",
    "ram_plus": "elementwise", "lines": "elementwise", "tsv": "spectral", "iso_c": "spectral",
    "iso_cts": "spectral", "dc_merge": "spectral", "esm": "spectral", "cart": "spectral", "star": "spectral",
    "knots": "spectral", "svc": "spectral", "fisher": "least squares", "fisher_nodes": "least squares",
    "ubgm": "least squares", "mats": "least squares", "regmean": "least squares",
    "regmean_pp": "least squares", "lot": "least squares", "cat": "least squares",
    "gram": "least squares", "weave": "least squares", "wudi": "least squares", "swudi": "least squares",
    "swudi_a": "least squares", "actmat": "least squares", "aim": "elementwise",
    "tall_masks": "keeps experts", "emr": "keeps experts", "tsv_c": "keeps experts",
}  # fmt: skip
PUBLISHED: Mapping[str, Params] = {
    "task_arithmetic": {"scale": 0.3},
    "iso_c": {"scale": 1.5},
    "iso_cts": {"scale": 1.5},
}
"""Settings of the papers where they are not the defaults of weft's functions."""
GRIDS: Mapping[str, Sequence[float]] = dict.fromkeys(
    ("task_arithmetic", "consensus", "magmax", "breadcrumbs"), SUMS
)
FORWARD = {"kfac_a": "kfac", "kfac_g": "kfac"}


def contenders() -> dict[str, Contender]:
    """Every contender by name: those of the registry, then the learned ones."""
    from weft.bench.adapters import ADAPTED

    found = {n: of_method(m) for n, m in METHODS.items() if n not in EXCLUDED}
    found |= {c.name: c for c in ADAPTED}
    return found


def of_method(method: Method) -> Contender:
    """A method of the registry as a contender."""
    kinds = [n for n in method.needs if not n.optional]
    seen: Seen = "unlabelled" if kinds else "none"
    per_task = "task" in method.params
    grid = GRIDS.get(method.name, MEANS) if "scale" in method.params and not per_task else ()

    def make(setting: Setting, params: Params) -> Outcome:
        return merged(setting, method, params)

    return Contender(
        method.name, method.name, make, FAMILIES.get(method.name, "keeps experts" if per_task else "other"), seen,
        PUBLISHED.get(method.name, {}), {"scale": grid} if grid else {}, method.base == "required", per_task,
        method.models,
    )  # fmt: skip


def merged(setting: Setting, method: Method, params: Params, also: Sequence[str] = ()) -> Outcome:
    """`weft.merge` of the suite's experts, in memory; `also` are statistics that the method may have."""
    import weft

    how: dict[str, Any] = {}
    seconds = 0.0
    kinds = [n for n in method.needs if not n.optional]
    own = tuple(dict.fromkeys([*(FORWARD.get(n.kind, n.kind) for n in kinds if not n.of_base), *also]))
    if method.name == "mats":  # one of two curvatures
        own = ("kfac",)
    of_base = tuple(dict.fromkeys(n.kind for n in kinds if n.of_base))
    if own:
        how["statistics"], seconds = setting.statistics(own)
    if of_base:
        how["base_statistics"], seconds = setting.base_statistics(of_base)
    if method.base != "forbidden" and setting.base is not None:
        how["base"] = setting.base

    def one(**more: Any) -> State:
        return weft.merge(setting.models, method, **how, **params, **more).state_dict()

    if "task" in method.params:
        states = {t.name: one(task=i) for i, t in enumerate(setting.tasks)}
        return Outcome(states=states, parameters=kept(method.name, setting), extra_seconds=seconds)
    return Outcome(one(), extra_seconds=seconds)


def kept(name: str, setting: Setting) -> float | None:
    """Numbers that the published compression keeps, a mask counted as one bit a weight."""
    n, k = setting.size, len(setting.tasks)
    if name == "tsv_c":  # one model a task of factors that hold a k-th of the rank, and the base
        shapes = [i.shape for i in setting.models[0].tensors.values() if len(i.shape) > 1]
        sizes = [(s[0], math.prod(s[1:])) for s in shapes]
        return n + sum(min(m, p) * (m + p) for m, p in sizes) + k * (n - sum(m * p for m, p in sizes))
    masks = {"tall_masks": 2 * n + k * n / 32, "emr": 2 * n + k * n / 32 + k}
    return masks.get(name)


def chosen(names: Sequence[str] | None, setting: Setting) -> tuple[list[Contender], dict[str, str]]:
    """Contenders by name or family, all by default; and why others cannot run. UsageError for unknown names."""
    known = contenders()
    families = {c.family for c in known.values()}
    if names is None:
        picked = list(known.values())
    else:
        wrong = [n for n in names if n not in known and n not in families]
        if wrong:
            raise UsageError(
                f"no contender is called {wrong[0]!r}{did_you_mean(wrong[0], [*known, *families])}; known: "
                f"{', '.join(known)}; families: {', '.join(sorted(families))}"
            )
        picked = [c for c in known.values() if c.name in names or c.family in names]
    why = {c.name: reason(c, setting) for c in picked}
    return [c for c in picked if not why[c.name]], {n: w for n, w in why.items() if w}


def reason(contender: Contender, setting: Setting) -> str:
    """Why a contender cannot run on this suite, or an empty string."""
    if contender.needs_base and setting.suite.base is None:
        return "needs a base"
    low, high = contender.models
    if len(setting.tasks) < low or (high is not None and len(setting.tasks) > high):
        return f"merges {low} models" if low == high else f"merges {low} or more models"
    if contender.seen != "none":
        try:
            for task in setting.tasks:
                setting.split(task)
        except UsageError as error:
            return str(error)
    return contender.fits(setting)


def count(state: Mapping[str, Tensor]) -> int:
    """Numbers in a state, shared tensors once."""
    return sum({t.data_ptr(): t.numel() for t in state.values()}.values())
