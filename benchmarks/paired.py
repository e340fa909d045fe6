"""One method against all others over the seeds of kept results: paired differences and their 95 % intervals.

    python benchmarks/paired.py gram_data docs/bench/digits.json
    python benchmarks/paired.py gram_data@fixed docs/bench/vision8*.json

Each seed has its own base and experts, so a difference is taken within a seed and averaged over them: of the mean
over tasks, and of the worst task's share of its expert. Methods that keep experts or see test inputs stand apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from weft.bench.page import title
from weft.bench.results import Results, Row, combined, half_interval, read
from weft.bench.table import group


def shares(results: Results, row: Row) -> dict[int, tuple[float, float]]:
    """Seed → (mean share of the experts, the worst task's), in percent."""
    found = {}
    for run in row.runs:
        per = results.relative(row, run.seed).values()
        found[run.seed] = 100 * mean(per), 100 * min(per)
    return found


def told(differences: Sequence[float]) -> str:
    half = half_interval(differences)
    return f"{mean(differences):+6.2f}" + ("" if half is None else f" ± {half:4.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", help="NAME, or NAME@fixed for its defaults where it is tuned, too")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--all", action="store_true", help="routed and test-time methods, too")
    given = parser.parse_args()
    results = combined([read(p) for p in given.results])
    name, _, how = given.method.partition("@")
    ours = results.row(name, how or None)
    own = shares(results, ours)
    print(f"{results.suite}, seeds {', '.join(map(str, results.seeds))}")
    average, worst = (mean(s[i] for s in own.values()) for i in (0, 1))
    print(f"{title(ours)}: {average:.2f} % of the experts, worst task {worst:.2f} %")
    rows = [r for r in results.at() if r is not ours and (given.all or group(r) == "static")]
    for row in sorted(rows, key=results.normalised, reverse=True):
        theirs = shares(results, row)
        by_mean, by_worst = ([own[s][i] - theirs[s][i] for s in own if s in theirs] for i in (0, 1))
        if by_mean:
            both = f"mean {told(by_mean)}   worst {told(by_worst)}"
            print(f"{title(row):38} {row.seen:11} {both}   {results.partly(row)}")


if __name__ == "__main__":
    main()
