"""Representation bias: how far a merged model's features are from an expert's on the expert's own data.

    L1 = mean |z_merged − z_expert|           (Yang et al., arXiv:2402.02705)
    CKA = ‖X̄ᵀȲ‖²_F / ‖X̄ᵀX̄‖_F ‖ȲᵀȲ‖_F      linear, with centred columns (Kornblith et al., arXiv:1905.00414)

CKA does not change under rotation and scaling of the features, L1 does: both low L1 and CKA near 1 say that the
merged model sees what the expert sees; a high L1 with CKA near 1 can be repaired linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from weft.analysis.features import features
from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Network
from weft.api import Model
from weft.errors import DataError, UsageError


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of features of the same n examples, [n, p] and [n, q]; 0 for constant features.

    Computed from n×n or p×q products, whichever is smaller, in float64. Raises UsageError for unequal n and
    DataError for fewer than two examples.
    """
    if len(x) != len(y):
        raise UsageError(f"CKA compares features of the same examples, not of {len(x)} and {len(y)}")
    if len(x) < 2:
        raise DataError("CKA needs at least two examples")
    x, y = (v.double() - v.double().mean(0) for v in (x, y))
    if len(x) <= min(x.shape[1], y.shape[1]):
        kx, ky = x @ x.T, y @ y.T
        cross, lengths = float((kx * ky).sum()), float(kx.norm() * ky.norm())
    else:
        cross, lengths = float((x.T @ y).square().sum()), float((x.T @ x).norm() * (y.T @ y).norm())
    return cross / lengths if lengths else 0.0


@dataclass(frozen=True)
class RepresentationBias(Finding):
    """By layer, on one expert's data."""

    model: str
    expert: str
    layers: tuple[str, ...]
    l1: tuple[float, ...]
    relative: tuple[float, ...]
    """L1 over the mean magnitude of the expert's features."""
    cka: tuple[float, ...]

    about: ClassVar[str] = (
        "Distance between the features of a merged model and of an expert on the expert's data: L1 "
        "(arXiv:2402.02705, relative to the expert's magnitudes) and linear CKA (arXiv:1905.00414)."
    )

    @property
    def title(self) -> str:
        return f"Representation bias of {self.model} towards {self.expert}"

    @property
    def headline(self) -> str:
        share = f"{100 * self.relative[-1]:.1f} % of the magnitude"
        return f"at the output: L1 {self.l1[-1]:.4g} ({share}), CKA {self.cka[-1]:.4f}"

    def plot(self) -> Any:
        made = figure("at the input of", "")
        for name, values in (("L1 / magnitude", self.relative), ("CKA", self.cka)):
            made.add_trace(graphs().Scatter(x=self.layers, y=values, name=name, mode="lines+markers"))
        made.update_xaxes(type="category")
        made.update_yaxes(rangemode="tozero")
        return made


def representation_bias(
    net: Network, model: Model, expert: Model, *, names: tuple[str, str] = ("merged", "expert")
) -> RepresentationBias:
    """Compare the features of two models on the data of the network, layer by layer.

    Layers are those of `weft.analysis.features`; the input, which both share, is left out.
    """
    merged, own = (features(net, net.state(m)) for m in (model, expert))
    layers, l1, relative, cka = [], [], [], []
    shared = next(iter(own))
    for layer, z in own.items():
        y = merged[layer]
        if layer == shared and len(own) > 1 and bool((z == y).all()):
            continue
        layers.append(layer)
        gap = float((y.double() - z.double()).abs().mean())
        size = float(z.double().abs().mean())
        l1.append(gap)
        relative.append(gap / size if size else 0.0)
        cka.append(linear_cka(y.flatten(1), z.flatten(1)))
    return RepresentationBias(*names, tuple(layers), tuple(l1), tuple(relative), tuple(cka))
