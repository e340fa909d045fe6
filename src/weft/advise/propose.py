"""`weft.advise`: a recipe for the models at hand, the reasons for it, what it costs, and what else to try.

The rules are few, and each names its evidence: a figure that was measured on these models, or docs/bench.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from weft.advise.look import Look, look
from weft.api import Model
from weft.errors import UsageError

Data = Literal["none", "unlabelled", "labelled"]
DATA: tuple[Data, ...] = ("none", "unlabelled", "labelled")

STRANGERS = 0.5
"""Models whose weights have a mean cosine below this have no ancestor in common."""
ALIKE = 0.6
"""Task vectors with a mean cosine above this are of one task."""
SPARSE = 0.3
"""A model that changes a smaller share of its entries is sparse, as models trained by reinforcement are."""
THIN = 0.35
"""Task vectors whose energy lies in a smaller share of the rank are low-rank."""
FAR = 0.5
"""A task vector longer than this share of the base is far from it."""
MANY = 6


@dataclass(frozen=True)
class Advice:
    """What to do, and why."""

    look: Look
    method: str
    params: dict[str, Any]
    reasons: tuple[str, ...]
    recipe: str
    """YAML that `weft check` accepts; an empty string where no merge by weight makes sense yet."""
    commands: tuple[str, ...]
    """In order; what is in capitals is yours to fill in."""
    cost: str
    instead: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"Proposed: {self.method}" + "".join(f", {k} {v}" for k, v in self.params.items()), ""]
        lines += [f"  because {r}" for r in self.reasons]
        lines += [f"  take care: {w}" for w in self.warnings]
        lines += ["", f"Cost: {self.cost}", "", "Run:"]
        lines += [f"  {c}" for c in self.commands]
        if self.instead:
            lines += ["", "Or:", *(f"  {i}" for i in self.instead)]
        return "\n".join(lines)


def advise(models: Sequence[Model], base: Model | None = None, data: Data = "none") -> Advice:
    """Look at the models and propose a recipe. `data` says what there is of each model's task.

    Raises UsageError for fewer than two models or an unknown kind of data, DataError for models that hold NaN or
    share no matrix.
    """
    if data not in DATA:
        raise UsageError(f"data are {', '.join(DATA)}, not {data!r}")
    return propose(look(models, base), data)


def propose(seen: Look, data: Data = "none") -> Advice:
    """The proposal for what was seen."""
    warnings = [f"{a} and {b} hold the same values" for a, b in seen.twins]
    if seen.shapes_differ:
        n = len(seen.shapes_differ)
        warnings.append(
            f"{n} tensor{'s' * (n > 1)} ({seen.shapes_differ[0]} …) are not in all models in one shape: "
            "classifiers and vocabularies need a decision (missing:, mismatch:, tokenizer_source: in the recipe)"
        )
    method, params, reasons, instead = _method(seen, data)
    if seen.batchnorm:
        reasons.append("there is BatchNorm, whose running statistics no average of weights gives")
    if max(seen.norms, default=0.0) > FAR:
        far = max(seen.norms)
        warnings.append(f"a task vector is {far:.1f} times as long as the base: is this really the base?")
    written = _recipe(seen, method, params) if method != "align" else ""
    return Advice(
        seen, method, params, tuple(reasons), written, tuple(_commands(seen, method, params, data)),
        _cost(seen, method), tuple(instead), tuple(warnings),
    )  # fmt: skip


def _method(seen: Look, data: Data) -> tuple[str, dict[str, Any], list[str], list[str]]:
    """Method, parameters, reasons, alternatives."""
    if seen.base is None:
        return _baseless(seen, data)
    k, cosine, conflict = seen.count, seen.cosine or 0.0, seen.conflict or 0.0
    reasons = [
        f"{k} task vectors with a mean cosine of {cosine:.2f}; where several models change an entry, "
        f"their signs differ in {100 * conflict:.0f} %"
    ]
    if cosine > ALIKE:
        reasons.append("vectors that agree so much are of one task: their mean is a soup")
        return (
            "linear",
            {},
            reasons,
            ["model_stock, which draws the mean towards the base where they scatter"],
        )
    if seen.changed and max(seen.changed) < SPARSE:
        share = 100 * max(seen.changed)
        reasons.append(
            f"each model changes at most {share:.0f} % of its entries: dilution by a mean is what hurts"
        )
        return "ram_plus", {}, reasons, ["task_arithmetic with a scale chosen on validation data"]
    if seen.kind and not seen.adapters and seen.parameters > 5e8:
        reasons.append(
            "for large language models of unknown making only task arithmetic was found to gain reliably "
            "(arXiv:2511.21437); choose its scale on validation data"
        )
        return "task_arithmetic", {"scale": round(max(0.2, 1 / k), 2)}, reasons, [
            "tsv or swudi_a, which win on clean, complementary experts; compare them with `weft search`",
        ]  # fmt: skip
    if seen.adapters == k or (seen.ranks and max(seen.ranks) < THIN):
        what = "the models are adapters" if seen.adapters == k else "the task vectors are of low rank"
        reasons.append(f"{what}: spectral methods have to keep to the rank that is there, as weft's do")
    if data != "none":
        reasons.append(
            "a few dozen inputs a task give Gram matrices, and with them the merge that is best layer by layer"
        )
        reasons.append(
            "with 32 inputs a task, task vectors as a prior and no scale to tune: best of docs/bench.md on digits"
        )
        return "gram", {}, reasons, [
            "regmean, the published method; tsv or swudi_a, which need no data",
            *_routing(seen),
        ]  # fmt: skip
    reasons.append(
        "without data, the tasks' leading directions brought apart lose least untuned (docs/bench.md)"
    )
    return "tsv", {}, reasons, [
        "swudi_a, iso_c, weave; task_arithmetic, the simplest: `weft search` compares them on validation data",
        *_routing(seen),
    ]  # fmt: skip


def _baseless(seen: Look, data: Data) -> tuple[str, dict[str, Any], list[str], list[str]]:
    if seen.likeness < STRANGERS:
        reasons = [
            f"the weights have a mean cosine of {seen.likeness:.2f}: these networks come from different "
            "random starts, and their mean is no network; bring the units into one order first"
        ]
        more = ["merge by regmean with inputs of each task, which needs no order"] if data != "none" else []
        return "align", {}, reasons, [*more, "keep both and average their outputs"]
    reasons = [f"the weights have a mean cosine of {seen.likeness:.2f}, so they have an ancestor in common"]
    ask = "name what they were fine-tuned from (--base): task vectors allow far better merges"
    if data != "none":
        return "regmean", {}, [*reasons, "inputs of each task are at hand, and no base is needed"], [ask]
    if seen.count == 2:
        return "slerp", {"t": 0.5}, [*reasons, "two models without a base"], [ask]
    return "linear", {}, [*reasons, "several models without a base"], [ask]


def _routing(seen: Look) -> list[str]:
    if seen.count < MANY:
        return []
    return [
        f"with {seen.count} tasks one set of weights loses much: `weft.route` keeps the experts, compressed"
    ]


def _recipe(seen: Look, method: str, params: dict[str, Any]) -> str:
    from weft.methods.registry import METHODS

    uses_base = seen.base is not None and METHODS[method].base != "forbidden"
    statistics = _measured(method)
    models: list[Any] = [
        {"model": m, "statistics": folder} if statistics else {"model": m}
        for m, folder in zip(seen.models, _folders(seen), strict=True)
    ]
    recipe: dict[str, Any] = {"merge_method": method}
    if uses_base:
        recipe["base_model"] = seen.base
    recipe["models"] = models
    if params:
        recipe["parameters"] = params
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _measured(method: str) -> bool:
    """Whether the recipe names statistics of every model."""
    return method in ("regmean", "gram")


def _folders(seen: Look) -> list[str]:
    return [f"statistics-{i}" for i in range(1, seen.count + 1)]


def _commands(seen: Look, method: str, params: dict[str, Any], data: Data) -> list[str]:

    if method == "align":
        a, *others = seen.models
        return [f"weft align {b} --to {a}" for b in others] + ["weft advise the results again"]
    made = []
    if _measured(method):
        made += [
            f"weft measure {m} {f} --what gram --samples 64 --data PKG:INPUTS_OF_{i}"
            for i, (m, f) in enumerate(zip(seen.models, _folders(seen), strict=True), 1)
        ]
    made += ["weft check recipe.yml", "weft merge recipe.yml merged"]
    if seen.batchnorm:
        made.append("weft calibrate merged mended --how batchnorm --module PKG:NETWORK --data PKG:INPUTS")
    if data == "labelled":
        made.append("weft search search.yml  # scale and method on validation data: see docs/search.md")
    return made


def _cost(seen: Look, method: str) -> str:
    """Reading dominates elementwise methods, decompositions the others."""
    k = seen.count + (seen.base is not None)
    read = k * seen.bytes
    how = "decompositions of every matrix, some minutes a billion parameters on a few cores"
    if method in ("linear", "slerp", "task_arithmetic", "ram_plus"):
        how = "one or two passes over the files, as fast as they are read"
    if method == "align":
        how = "a matching for every layer"
    return f"{_size(read)} read, {_size(seen.bytes)} written; {how}"


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
