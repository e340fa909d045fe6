"""The picture of a search: every candidate's score and the best so far, or the front of two objectives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from weft.analysis.picture import INK, TITLE, checked
from weft.errors import UsageError
from weft.search.result import Result

GREY, BLUE, RED = "#a9afb8", "#3366cc", "#c2347a"


def draw(found: Result, path: Path) -> None:
    """Write the picture; the name appears when the file is whole."""
    checked(path)
    if not found.complete:
        raise UsageError("no candidate has a score, so there is nothing to draw")
    from matplotlib.figure import Figure

    two = len(found.objectives) == 2
    count = 1 if two else len(found.objectives)
    figure = Figure(figsize=(8, 3.4 * count + 1), layout="constrained", dpi=150)
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    if two:
        _front(panels[0], found)
    else:
        for panel, objective in zip(panels, found.objectives, strict=True):
            _history(panel, found, objective.name, objective.direction == "maximize")
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _history(panel: Any, found: Result, name: str, up: bool) -> None:
    done = found.complete
    scores = [t.scores[name] for t in done]
    best: list[float] = []
    for score in scores:
        best.append(score if not best else (max if up else min)(best[-1], score))
    numbers = [t.number for t in done]
    panel.plot(numbers, scores, ".", color=GREY, label="candidate")
    panel.step(numbers, best, where="post", color=BLUE, label="best so far")
    for i, t in enumerate(t for t in found.trials if t.state == "pruned"):
        panel.axvline(t.number, color=RED, alpha=0.25, linewidth=1, label=None if i else "refused")
    panel.set_xlabel("trial", color=INK)
    panel.set_title(f"{name}, on {found.objectives[0].validation}", **TITLE)
    panel.legend(frameon=False, fontsize=8)


def _front(panel: Any, found: Result) -> None:
    a, b = (o.name for o in found.objectives)
    points = [(t.scores[a], t.scores[b]) for t in found.complete]
    front = sorted((t.scores[a], t.scores[b]) for t in found.front)
    best = found.best
    panel.plot(*zip(*points, strict=True), ".", color=GREY, label="candidate")
    panel.plot(*zip(*front, strict=True), "o-", color=BLUE, markersize=4, label="Pareto front")
    panel.plot([best.scores[a]], [best.scores[b]], "D", color=RED, label="balanced")
    for set_label, o in zip((panel.set_xlabel, panel.set_ylabel), found.objectives, strict=True):
        set_label(f"{o.name} ({'more' if o.direction == 'maximize' else 'less'} is better)", color=INK)
    panel.set_title(f"{a} and {b}, on {found.objectives[0].validation}", **TITLE)
    panel.legend(frameon=False, fontsize=8)
