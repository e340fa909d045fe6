"""Search the Gram solver's settings for the best static merge, on validation data: without or with few inputs.

    python benchmarks/search_static.py digits --seeds 3 --data unlabelled

Test data are not looked at. Prints every setting with the mean over tasks of its validation score relative to the
expert's, and the worst task's, over the seeds; the published methods stand beside them, each at its best scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any

from weft.bench.contenders import SUMS, Outcome, contenders, merged
from weft.bench.results import ratio
from weft.bench.run import VALIDATION, Judge, along
from weft.bench.score import score
from weft.bench.setting import Setting
from weft.bench.suite import Suite
from weft.bench.suites import suite_named
from weft.methods.registry import METHODS

SCALES = (0.5, 0.7, 1.0, 1.3, 1.6, 2.0)
PUBLISHED = (
    "task_arithmetic",
    "tsv",
    "iso_c",
    "iso_cts",
    "dc_merge",
    "swudi",
    "swudi_a",
    "actmat",
    "regmean",
    "lot",
    "esm",
)


def settings(data: bool) -> Iterator[dict[str, Any]]:
    """Which Gram matrices, how inverted, what is kept."""
    filters: list[dict[str, Any]] = (
        [{"filter": "ridge", "ridge": r} for r in (0.01, 0.1, 0.5, 1.0)]
        + [{"filter": "exact", "share": s} for s in (0.65, 1.0)]
        + [{"filter": "exact", "cut": "participation"}]
    )
    priors = (0.0, 0.1, 0.5) if data else (1.0,)
    for prior, how, keep in product(priors, filters, ("sum", "tsv")):
        yield {"prior": prior, **how, "keep": keep}


Scores = dict[str, list[tuple[float, float]]]
"""Setting → (mean, worst task) of every seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--data", choices=("none", "unlabelled"), default="none")
    parser.add_argument("--first", type=int, default=40, help="how many rows to print")
    given = parser.parse_args()
    scores: Scores = {}
    for seed in range(given.seeds):
        made = suite_named(given.suite)(seed, None, print)
        setting = Setting(made if isinstance(made, Suite) else made[-1], given.samples)
        tried(setting, Judge(setting, seed), given.data == "unlabelled", scores)
    rows = [(mean(m for m, _ in v), mean(w for _, w in v), name) for name, v in scores.items()]
    for average, worst, name in sorted(rows, reverse=True)[: given.first]:
        print(f"{100 * average:6.2f} {100 * worst:6.2f}  {name}")


def tried(setting: Setting, judge: Judge, data: bool, scores: Scores) -> None:
    """Every setting on one seed."""

    def add(name: str, outcome: Outcome) -> None:
        shares = []
        for t in setting.tasks:
            value = score(judge.at(outcome, t), t, "validation", VALIDATION).value
            shares.append(ratio(value, judge.experts[t.name], t.metric == "perplexity"))
        scores.setdefault(name, []).append((mean(shares), min(shares)))

    gram = replace(
        contenders()["gram"], make=lambda s, p: merged(s, METHODS["gram"], p, ("gram",) if data else ())
    )
    for setup in settings(data):
        start = merged(setting, METHODS["gram"], setup, ("gram",) if data else ())
        for scale, outcome in along(replace(gram, params=setup), setting, "scale", SCALES, start):
            add(_told({**setup, "scale": scale}), outcome)
    for name in PUBLISHED:
        c = contenders()[name]
        start = c.make(setting, c.params)
        add(f"[{name} {_told(c.params)}]", start)
        if "scale" in METHODS[name].params:
            scales = SUMS if name == "task_arithmetic" else (*SCALES, 3.0, 4.0)
            for scale, outcome in along(c, setting, "scale", scales, start):
                add(f"[{name} {_told({**c.params, 'scale': scale})}]", outcome)


def _told(setup: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in setup.items())


if __name__ == "__main__":
    main()
