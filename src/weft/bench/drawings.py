"""The page's drawings, as SVG written by hand: radar, lines, scatter. Their colours are the page's variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 48, 190, 34, 44
COLOURS = 8


def radar(axes: Sequence[str], values: Mapping[str, Sequence[float]]) -> str:
    """One ring a quarter of 1; values in [0, 1] and a little beyond; name → one value an axis."""
    cx, cy, radius = 280.0, 205.0, 150.0

    def at(i: int, share: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        return cx + radius * share * math.cos(angle), cy + radius * share * math.sin(angle)

    parts = [f'<circle class="axis" cx="{cx}" cy="{cy}" r="{radius * r:g}"/>' for r in (0.25, 0.5, 0.75, 1.0)]
    for i, name in enumerate(axes):
        x, y = at(i, 1.0)
        parts.append(f'<line class="axis" x1="{cx}" y1="{cy}" x2="{x:.1f}" y2="{y:.1f}"/>')
        tx, ty = at(i, 1.1)
        anchor = "middle" if abs(tx - cx) < 12 else "start" if tx > cx else "end"
        parts.append(
            f'<text class="name" x="{tx:.1f}" y="{ty + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
        )
    for n, (name, shares) in enumerate(values.items()):
        points = " ".join("{:.1f},{:.1f}".format(*at(i, max(0.0, s))) for i, s in enumerate(shares))
        mean = sum(shares) / len(shares)
        parts.append(
            f'<g class="series c{n % COLOURS}"><title>{escape(name)}: {100 * mean:.1f} % of the experts</title>'
            f'<polygon class="area stroke" points="{points}"/>{_key(560, 110 + 24 * n, name)}</g>'
        )
    return _svg("".join(parts), f"Share of each task's expert: {', '.join(values)}")


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """name → points (x, y), named at the right end."""
    xs = [p[0] for points in series.values() for p in points]
    ys = [p[1] for points in series.values() for p in points]
    frame = _Frame(min(xs), max(xs), *_range(ys))
    parts = [frame.grid(x, y, sorted(set(xs)))]
    ends = _apart([(frame.y(points[-1][1]), name) for name, points in series.items()])
    for n, (name, points) in enumerate(series.items()):
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in points)
        told = ", ".join(f"{a:g}: {b:.1f}" for a, b in points)
        parts.append(
            f'<g class="series c{n % COLOURS}"><title>{escape(name)} ({told})</title><polyline class="stroke" '
            f'points="{path}"/>{_text(frame.right + 8, ends[name] + 4, name)}</g>'
        )
    height = max(HEIGHT, max(ends.values()) + 20)
    return _svg("".join(parts), f"{y} by {x}", height)


def scatter(points: Sequence[tuple[float, float, str, str]], x: str, y: str) -> str:
    """Points (x > 0, y, name, group) on a logarithmic x axis; the upper envelope is named, the rest on hover."""
    low, high = (f(math.log10(p[0]) for p in points) for f in (min, max))
    frame = _Frame(math.floor(low), math.ceil(high + 1e-9) if math.ceil(high) > math.floor(low) else low + 1,
                   *_range([p[1] for p in points]))  # fmt: skip
    ticks = range(int(frame.low), int(frame.high) + 1)
    parts = [frame.grid(x, y, [float(t) for t in ticks], {float(t): f"{10.0**t:g}" for t in ticks})]
    groups = list(dict.fromkeys(p[3] for p in points))
    best, top = set(), -math.inf
    for p in sorted(points):
        if p[1] > top:
            top = p[1]
            best.add(p[2])
    names = []  # drawn after all points, so that none lies over them
    for a, b, name, group in points:
        px, py = frame.x(math.log10(a)), frame.y(b)
        parts.append(
            f'<g class="series c{groups.index(group) % COLOURS}">'
            f"<title>{escape(name)}: {b:.1f} % in {a:.2g} s</title>"
            f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5"/></g>'
        )
        if name in best:
            names.append(_text(px + 8, py - 6, name))
    parts += names
    for n, group in enumerate(groups):
        parts.append(f'<g class="c{n % COLOURS}">{_key(frame.right + 14, 40 + 24 * n, group)}</g>')
    return _svg("".join(parts), f"{y} by {x}")


class _Frame:
    """Data to pixels, and the grid behind them."""

    right = WIDTH - RIGHT

    def __init__(self, low: float, high: float, bottom: float, top: float) -> None:
        self.low, self.high = low, high if high > low else low + 1
        self.bottom, self.top = bottom, top

    def x(self, v: float) -> float:
        return LEFT + (self.right - LEFT) * (v - self.low) / (self.high - self.low)

    def y(self, v: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (v - self.bottom) / (self.top - self.bottom)

    def grid(self, x: str, y: str, ticks: Sequence[float], names: Mapping[float, str] | None = None) -> str:
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1e9) if (self.top - self.bottom) / s <= 8)
        levels = [self.bottom + i * step for i in range(int((self.top - self.bottom) / step) + 1)]
        parts = [
            f'<line class="axis" x1="{LEFT}" x2="{self.right}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{self.y(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
            for v in levels
        ]
        parts += [
            f'<text x="{self.x(t):.1f}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">'
            f"{(names or {}).get(t, f'{t:g}')}</text>"
            for t in ticks
        ]
        middle = (LEFT + self.right) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
        parts.append(f'<text x="{LEFT - 40}" y="{TOP - 20}">{escape(y)}</text>')
        return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil(max(values) / 5)
    return float(low), float(high if high > low else low + 5)


def _apart(ends: Sequence[tuple[float, str]], gap: float = 13.0) -> dict[str, float]:
    """Labels moved down until none covers another."""
    placed: dict[str, float] = {}
    last = -math.inf
    for y, name in sorted(ends):
        last = max(y, last + gap)
        placed[name] = last
    return placed


def _key(x: float, y: float, name: str) -> str:
    return f'<circle class="dot" cx="{x}" cy="{y}" r="5"/>{_text(x + 12, y + 4, name)}'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="name" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(inside: str, label: str, height: float = HEIGHT) -> str:
    described = escape(label, quote=True)
    return f'<svg role="img" aria-label="{described}" viewBox="0 0 {WIDTH} {height:g}">{inside}</svg>'
