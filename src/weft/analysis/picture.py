"""The picture of a comparison: where along the network, and in which modules, two checkpoints differ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.analysis.diff import Comparison
from weft.analysis.groups import group_of, in_order, kind_of
from weft.analysis.sums import Difference
from weft.errors import DataError, MissingExtra, UsageError
from weft.methods.layers import block_of

SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = {
    "attention": "#3366cc", "mlp": "#d9602b", "norm": "#2a9d5c", "embedding": "#8a5fbf", "head": "#c2347a",
    "router": "#b8961f", "conv": "#1f9eb0", "other": "#7f8794",
}  # fmt: skip
INK = "#3a3f47"
TITLE: dict[str, Any] = {"fontsize": 9, "color": INK, "loc": "left"}


def checked(path: Path) -> None:
    """Raise UsageError, MissingExtra or DataError if no picture could be drawn there."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is no folder; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "plot", "drawing a picture") from None


def draw(found: Comparison, path: Path) -> None:
    """Write the picture; the name appears when the file is whole."""
    checked(path)
    if not found.tensors:
        raise DataError(f"{found.a} and {found.b} share no tensor, so there is nothing to draw in {path}")
    from matplotlib.figure import Figure

    blocks = {n: d for n, d in found.tensors.items() if block_of(n) and n not in found.integers}
    columns = list(dict.fromkeys(group_of(n) for n in in_order(blocks)))
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=150)
    if len(columns) > 1:
        _draw_blocks(figure, found, blocks, columns)
    else:
        _draw_tensors(figure, found)
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _title(figure: Any, found: Comparison) -> None:
    t = found.total
    names = [_short(n) for n in (found.a, found.b)]
    what = f"A = {names[0]}   B = {names[1]}"
    if found.base is not None:
        what += f"   task vectors from {_short(found.base)}"
    parts = [f"{100 * t.changed:.1f} % of values changed"]
    parts += [] if t.relative is None else [f"relative difference {t.relative:.3g}"]
    parts += [] if t.cosine is None else [f"cosine {t.cosine:.4f}"]
    figure.suptitle(
        f"{what}\n{'  ·  '.join(parts)}", fontsize=10, color=INK, x=0.01, ha="left", parse_math=False
    )


def _short(origin: str) -> str:
    tail = origin.rstrip("/").rpartition("/")[2] or origin
    return "".join(c if c.isprintable() else "?" for c in tail)[:40]


def _draw_blocks(
    figure: Any, found: Comparison, blocks: Mapping[str, Difference], columns: list[str]
) -> None:
    """Lines by kind of module above, a map of every tensor of the block below."""
    rows = list(dict.fromkeys(_inner(n) for n in sorted(blocks, key=lambda n: (kind_of(n), _inner(n)))))
    high = min(max(4.5 + 0.24 * len(rows), 6.5), 16)
    figure.set_size_inches(min(max(10, 0.22 * len(columns) + 4), 22), high)
    _title(figure, found)
    grid = figure.add_gridspec(2, 2, height_ratios=[2.3, max(2.2, 0.24 * len(rows))])
    place = {label: i for i, label in enumerate(columns)}
    at = {row: i for i, row in enumerate(rows)}
    line_axes = (figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1]))
    maps = (figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1]))
    vectors = "task vectors" if found.base is not None else "weights"
    _lines(line_axes[0], found, blocks, columns, "relative")
    _lines(line_axes[1], found, blocks, columns, "cosine")
    line_axes[0].set_title(f"relative difference ‖B − A‖ / ‖A‖ of the {vectors}", **TITLE)
    line_axes[1].set_title(f"cosine of the {vectors}", **TITLE)
    _keep_in_proportion(line_axes[0], line_axes[1], found.base is not None)
    if line_axes[0].get_legend_handles_labels()[1]:
        figure.legend(
            *line_axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=4,
            loc="outside upper right", labelcolor=INK,
        )  # fmt: skip
    cells: list[list[Difference | None]] = [[None] * len(columns) for _ in rows]
    for name, d in blocks.items():
        cells[at[_inner(name)]][place[group_of(name)]] = d
    signed = found.base is not None

    def change(d: Difference) -> float | None:
        return d.relative or None  # grey where nothing changed

    def direction(d: Difference) -> float | None:
        return d.cosine if signed or d.changes else None

    changes = [[_number(change(d) if d else None) for d in row] for row in cells]
    cosines = [[_number(direction(d) if d else None) for d in row] for row in cells]
    _map(figure, maps[0], changes, rows, columns, logarithmic=True)
    _map(figure, maps[1], cosines, None, columns, around_zero=signed)


def _inner(name: str) -> str:
    """A tensor's name within its block."""
    return name.removeprefix(f"{group_of(name)}.")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _lines(
    ax: Any, found: Comparison, blocks: Mapping[str, Difference], columns: list[str], value: str
) -> None:
    """One line a kind of module over the blocks; a dotted one for what lies outside them."""
    inside: dict[tuple[str, str], list[Difference]] = {}
    outside: dict[str, list[Difference]] = {}
    for name, d in found.tensors.items():
        if name in blocks:
            inside.setdefault((kind_of(name), group_of(name)), []).append(d)
        elif name not in found.integers:
            outside.setdefault(kind_of(name), []).append(d)
    for kind, colour in COLOURS.items():
        each = [Difference.total(inside.get((kind, c), [])) for c in columns]
        if any(d.changes for d in each):
            marker = "o" if len(columns) <= 48 else None
            points = [_number(getattr(d, value) if d.numel else None) for d in each]
            for start, stop in _runs(columns):
                label = None if start else kind
                places = range(start, stop)
                ax.plot(places, points[start:stop], color=colour, label=label, lw=1.6, marker=marker, ms=3.5)
        other = Difference.total(outside.get(kind, []))
        if other.changes and getattr(other, value) is not None:
            ax.axhline(getattr(other, value), color=colour, lw=1.3, ls=":", label=f"{kind} (no block)")
    ax.set_xticks(list(_marks(columns)))
    ax.set_xlim(-0.5, len(columns) - 0.5)
    _plain(ax)
    ax.grid(axis="y", color="#e4e6ea", lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelbottom=False)


def _keep_in_proportion(relative: Any, cosine: Any, task_vectors: bool) -> None:
    """Noise must not fill the axis: relative differences begin at zero, cosines of task vectors span 0.2."""
    low, high = relative.dataLim.intervaly
    if low > 0 and high > 20 * low:
        relative.set_yscale("log")
    else:
        relative.set_ylim(bottom=0, top=1.2 * high if 0 < high < float("inf") else None)
    if task_vectors:
        low, high = cosine.dataLim.intervaly
        if low <= high:
            cosine.set_ylim(min(low - 0.02, -0.1), max(high + 0.02, 0.1))
        cosine.axhline(0, color="#b9bec6", lw=0.8)


def _runs(columns: list[str]) -> list[tuple[int, int]]:
    """Where each stack of blocks begins and ends."""
    stacks = [c.rpartition(".")[0] for c in columns]
    starts = [i for i in range(len(columns)) if i == 0 or stacks[i] != stacks[i - 1]]
    return list(zip(starts, [*starts[1:], len(columns)], strict=True))


def _marks(columns: list[str]) -> dict[int, str]:
    """Place → the number of the block there, sixteen or so of them."""
    step = max(1, len(columns) // 16)
    numbers = [c.rpartition(".")[2] for c in columns]
    return {i: n for i, n in enumerate(numbers) if int(n) % step == 0}


def _plain(ax: Any) -> None:
    ax.tick_params(labelsize=8, colors=INK, length=2)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#b9bec6")


def _map(
    figure: Any, ax: Any, cells: list[list[float]], rows: list[str] | None, columns: list[str], *,
    logarithmic: bool = False, around_zero: bool = False,
) -> None:  # fmt: skip
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    data: Any = np.ma.masked_invalid(np.array(cells, dtype=float))
    low, high = (float(data.min()), float(data.max())) if data.count() else (0.0, 1.0)
    norm: Any = LogNorm(low, high) if logarithmic and 0 < 20 * low < high else Normalize(low, high)
    if around_zero:
        norm = Normalize(-max(0.1, -low, high), max(0.1, -low, high))
    elif logarithmic and isinstance(norm, Normalize) and not isinstance(norm, LogNorm):
        norm = Normalize(0, high)
    colours = "RdBu" if around_zero else "viridis" if logarithmic else "magma"
    image = ax.imshow(data, aspect="auto", cmap=colours, norm=norm, interpolation="none")
    ax.set_facecolor("#eceef1")  # where there is no figure: no such tensor, or nothing changed
    ax.set_yticks(range(len(rows or [])), rows or [], parse_math=False)
    stacks = [c.rpartition(".")[0] for c in columns]
    marks = _marks(columns)
    ax.set_xticks(list(marks), list(marks.values()))
    for start, _ in _runs(columns)[1:]:
        ax.axvline(start - 0.5, color="white", lw=2)
    every = ", then ".join(dict.fromkeys(s or "the model" for s in stacks))
    label = f"block of {every} (grey: the same in both)"
    ax.set_xlabel(label, fontsize=8, color=INK, parse_math=False)
    ax.tick_params(labelsize=8, colors=INK, length=2)
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=ax, pad=0.01, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)


def _draw_tensors(figure: Any, found: Comparison) -> None:
    """For a network without blocks: two bars a tensor, at most forty tensors."""
    names = in_order(found.tensors)
    if len(names) > 40:
        names = in_order(sorted(names, key=lambda n: -found.tensors[n].norm_difference)[:40])
    figure.set_size_inches(11, max(3, 1.6 + 0.26 * len(names)))
    _title(figure, found)
    left, right = figure.subplots(1, 2, sharey=True)
    turned = {n: None if d.cosine is None else 1 - d.cosine for n, d in found.tensors.items()}
    changed = {n: d.relative for n, d in found.tensors.items()}
    for ax, figures, title in (
        (left, changed, "relative difference ‖B − A‖ / ‖A‖"),
        (right, turned, "change of direction: 1 − cosine"),
    ):
        values = [_number(figures[n]) for n in names]
        ax.barh(range(len(names)), values, color=[COLOURS[kind_of(n)] for n in names], height=0.7)
        ax.set_title(title, **TITLE)
        ax.axvline(0, color="#b9bec6", lw=0.8)
        ax.grid(axis="x", color="#e4e6ea", lw=0.7)
        ax.set_axisbelow(True)
        _plain(ax)
    left.set_yticks(range(len(names)), names, parse_math=False)
    left.set_ylim(len(names) - 0.5, -0.5)
