"""The report's drawings: matplotlib figures as inline SVG whose colours and fonts follow the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from weft.demo.results import Results, Row
from weft.demo.tasks import SIDE, Task, originals, split_indices
from weft.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, FIRST, SECOND = "#010203", "#010204", "#010205", "#010206", "#010207"
"""Stand-ins that no drawing uses by chance; they become the page's variables, so dark mode reaches them."""
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", FIRST: "--first", SECOND: "--second"}


def require_matplotlib() -> None:
    """MissingExtra unless matplotlib can be imported."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "demo", "the report of weft demo") from None


def figure(width: float, height: float) -> tuple[Figure, Any]:
    """A bare figure of that many CSS pixels and its axes. No pyplot: no window, no global state."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = fig.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=MUTED, labelsize=11, length=0, pad=5)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    return fig, axes


def as_svg(fig: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element: no prolog, no metadata, no namespace URLs, ids of its own."""
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    described = f'<svg role="img" aria-label="{html.escape(label, quote=True)}"'
    text = text.replace("<svg", described, 1)
    return re.sub(r"\s*\n\s*", "\n", text)


def scale_curve(row: Row, results: Results) -> str:
    """Average accuracy of one method over its scale, on both splits, with the chosen scale marked."""
    fig, axes = figure(300, 190)
    scales = [p.scale for p in row.curve]
    axes.plot(scales, [100 * p.validation for p in row.curve], color=SECOND, linewidth=1.6, dashes=(4, 2))
    axes.plot(scales, [100 * p.test for p in row.curve], color=FIRST, linewidth=2.2)
    chosen = next(p for p in row.curve if p.scale == row.scale)
    axes.plot([chosen.scale], [100 * chosen.test], "o", color=FIRST, markersize=7, clip_on=False, zorder=5)
    base = 100 * results.row("base").scores.average
    axes.axhline(base, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_ylim(*curve_range(results))
    axes.set_xlim(0, max(scales) * 1.03)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.yaxis.set_major_locator(_few_ticks())
    label = f"{row.label}: accuracy by scale; {row.scale:g} chosen, {100 * chosen.test:.1f} % on test"
    return as_svg(fig, f"curve-{row.name}", label)


def curve_range(results: Results) -> tuple[float, float]:
    """One range of accuracies in percent for all curves, so that they can be compared by eye."""
    seen = [v for r in results.rows for p in r.curve for v in (p.validation, p.test)]
    return 100 * min(seen) // 10 * 10, min(100.0, 100 * max(seen) // 10 * 10 + 10)


def worst_task(rows: list[Row], results: Results) -> str:
    """For each model a bar up to its worst task, and a dot at its average."""
    fig, axes = figure(430, 27 * len(rows) + 40)
    places = range(len(rows), 0, -1)
    worst = [100 * r.scores.worst[1] for r in rows]
    colours = [FIRST if r.kind == "merge" else MUTED for r in rows]
    axes.barh(places, worst, height=0.5, color=colours, alpha=0.45)
    axes.scatter([100 * r.scores.average for r in rows], places, s=34, color=colours, zorder=3)
    for place, row, value in zip(places, rows, worst, strict=True):
        axes.text(value - 1.5, place, row.scores.worst[0], ha="right", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(list(places), [r.label for r in rows])
    axes.tick_params(axis="y", colors=INK, labelsize=11)
    axes.set_xlim(0, 100)
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.grid(False)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_xlabel("accuracy on test, %", color=MUTED, fontsize=11)
    listed = "; ".join(f"{r.label} {w:.0f} %" for r, w in zip(rows, worst, strict=True))
    return as_svg(fig, "worst", f"Accuracy on the worst task: {listed}")


def pixels(task: Task, digits: tuple[int, ...] = (3, 5, 7)) -> str:
    """What the task makes of some digits of the pre-training split, as small SVG pictures side by side."""
    images, labels = originals()
    index = split_indices()["pretrain"]
    chosen = [int(index[(labels[index] == d).nonzero()[0, 0]]) for d in digits]
    views = task.view(images[chosen])
    squares = []
    for i, view in enumerate(views):
        for y, line in enumerate(view.tolist()):
            for x, grey in enumerate(line):
                if grey > -0.9:
                    left = i * (SIDE + 1) + x
                    opacity = f"{(grey + 1) / 2:.2f}"
                    squares.append(f'<rect x="{left}" y="{y}" width="1" height="1" opacity="{opacity}"/>')
    width = len(digits) * (SIDE + 1) - 1
    return (
        f'<svg class="pixels" role="img" aria-label="the digits {", ".join(map(str, digits))}, {task.name}" '
        f'viewBox="0 0 {width} {SIDE}" shape-rendering="crispEdges">{"".join(squares)}</svg>'
    )


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])
