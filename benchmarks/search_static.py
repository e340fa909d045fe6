"""Search the Gram solver's settings for the best static merge, on validation data: without or with few inputs.

    python benchmarks/search_static.py digits --samples 32

Test data are not looked at. Prints every setting with the mean over tasks of its validation score relative to the
expert's, and the worst task's; the published methods stand beside them, each at its best scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from weft.bench.contenders import SUMS, contenders, merged
from weft.bench.results import ratio
from weft.bench.run import VALIDATION, Judge
from weft.bench.score import score
from weft.bench.setting import Setting
from weft.bench.suites import suite_named
from weft.methods.registry import METHODS

SCALES = (0.5, 0.7, 1.0, 1.3, 1.6, 2.0)
PUBLISHED = (
    "task_arithmetic",
    "tsv",
    "iso_c",
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
        [{"filter": "ridge", "ridge": r} for r in (0.001, 0.01, 0.1, 0.5)]
        + [{"filter": "exact", "share": s} for s in (0.65, 1.0)]
        + [{"filter": "exact", "cut": "participation"}]
    )
    priors = (0.0, 0.1, 0.5) if data else (1.0,)
    for prior, how, keep in product(priors, filters, ("sum", "mean", "tsv")):
        yield {"prior": prior, **how, "keep": keep}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--data", choices=("none", "unlabelled"), default="none")
    parser.add_argument("--first", type=int, default=40, help="how many rows to print")
    given = parser.parse_args()
    made = suite_named(given.suite)(given.seed, None, print)
    setting = Setting(made if not isinstance(made, list) else made[-1], given.samples)  # type: ignore[arg-type]
    judge = Judge(setting, given.seed)
    rows: list[tuple[float, float, str]] = []

    def add(name: str, outcome: Any) -> float:
        shares = []
        for t in setting.tasks:
            value = score(judge.at(outcome, t), t, "validation", VALIDATION).value
            shares.append(ratio(value, judge.experts[t.name], t.metric == "perplexity"))
        rows.append((sum(shares) / len(shares), min(shares), name))
        return rows[-1][0]

    also = ("gram",) if given.data == "unlabelled" else ()
    for setup in settings(bool(also)):
        best = add(_told(setup), merged(setting, METHODS["gram"], setup, also))
        for scale in SCALES:
            if scale != 1 and best > 0.9 * max(r[0] for r in rows):
                add(
                    _told({**setup, "scale": scale}),
                    merged(setting, METHODS["gram"], {**setup, "scale": scale}, also),
                )
    known = contenders()
    for name in PUBLISHED:
        c = known[name]
        for scale in (None, *(SUMS if name == "task_arithmetic" else SCALES)):
            if scale is None or "scale" in METHODS[name].params:
                params: Mapping[str, Any] = c.params if scale is None else {**c.params, "scale": scale}
                add(f"[{name} {_told(params)}]", c.make(setting, params))
    for mean, worst, name in sorted(rows, reverse=True)[: given.first]:
        print(f"{100 * mean:6.2f} {100 * worst:6.2f}  {name}")


def _told(setup: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in setup.items())


if __name__ == "__main__":
    main()
