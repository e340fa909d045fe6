"""`Finding`: what an analysis returns. A small frozen dataclass of plain numbers that can be drawn and written.

`plot()` gives a plotly figure (extra `plot`), `to_json()` plain data, `headline` the result in one sentence.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from weft.errors import MissingExtra

KEPT: dict[str, Any] = {"json": False}
"""Metadata of a field that is for further work (weights, say) and not written as JSON."""

COLOURS = ("#2f6fdb", "#d9602b", "#2a9d5c", "#8a5fbf", "#c2347a", "#b8961f", "#1f9eb0", "#7f8794")
SCALE = [[0.0, "#f2f5fb"], [0.25, "#b9cdf0"], [0.5, "#6d97de"], [0.75, "#3a62ab"], [1.0, "#1b2f58"]]
DIVERGING = [[0.0, "#b4431a"], [0.25, "#eaa98b"], [0.5, "#f7f7f5"], [0.75, "#8fb1ea"], [1.0, "#23509f"]]


class Finding(ABC):
    """A result. Subclasses are frozen dataclasses."""

    about: ClassVar[str]
    """What was computed, with the formula and the paper, in one or two sentences."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What the finding is called in a report."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """The result in one sentence."""

    @abstractmethod
    def plot(self) -> Any:
        """A plotly figure. Raises MissingExtra without plotly."""

    def to_json(self) -> dict[str, Any]:
        """Every field as plain data; numbers that are not finite are null."""
        told = {
            f.name: plain(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
            if f.metadata.get("json", True)
        }
        return {"finding": type(self).__name__, "title": self.title, "headline": self.headline, **told}


def plain(value: Any) -> Any:
    """JSON's own types: tensors and tuples become lists, what is not finite becomes None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    to_json = getattr(value, "to_json", None)
    return to_json() if to_json is not None else value


def graphs() -> Any:
    """plotly's graph objects, imported when first needed."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingExtra("plotly", "plot", "plotting a finding") from None
    return go


def figure(x: str = "", y: str = "", **layout: Any) -> Any:
    """An empty figure in the report's style, with titles for its two axes."""
    made = graphs().Figure()
    style: dict[str, Any] = {
        "template": "plotly_white", "colorway": COLOURS, "height": 420, "hovermode": "closest",
        "margin": {"l": 70, "r": 30, "t": 64, "b": 60}, "font": {"family": "system-ui, sans-serif", "size": 13},
        "modebar": {"orientation": "h", "bgcolor": "rgba(0,0,0,0)"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }  # fmt: skip
    made.update_layout(**style | layout)
    made.update_xaxes(title_text=x, zeroline=False)
    made.update_yaxes(title_text=y, zeroline=False)
    return made


def equal_axes(made: Any) -> None:
    """One unit is as long along y as along x, and the axes end where the values do."""
    made.update_xaxes(constrain="domain")
    made.update_yaxes(scaleanchor="x", scaleratio=1, constrain="domain")


def matrix_figure(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *,
    signed: bool = False, label: str = "",
) -> Any:  # fmt: skip
    """A heat map with the numbers in its cells; `signed` puts the middle colour at zero."""
    made = figure()
    text = [["" if v is None else f"{v:.3f}" for v in row] for row in values]
    limit = max((abs(v) for row in values for v in row if v is not None), default=1.0) or 1.0
    span: dict[str, Any] = {"zmin": -limit, "zmax": limit, "colorscale": DIVERGING} if signed else {
        "zmin": 0.0, "zmax": limit, "colorscale": SCALE}  # fmt: skip
    made.add_trace(graphs().Heatmap(
        z=[list(row) for row in values], x=list(columns), y=list(rows), text=text, texttemplate="%{text}",
        hovertemplate="%{y} · %{x}: %{z:.5f}<extra></extra>", colorbar={"title": {"text": label}}, **span,
    ))  # fmt: skip
    made.update_yaxes(autorange="reversed", type="category")
    made.update_xaxes(type="category")
    made.update_layout(height=max(300, 160 + 34 * len(rows)))
    return made
