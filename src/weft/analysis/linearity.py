"""Layer-wise linearity of features: is a mixed network's feature the mixture of the features?

    f^ℓ(Σ cᵢθᵢ)  ≈  Σ cᵢ f^ℓ(θᵢ)      in every layer ℓ

For two models of one task this is LLFC (Zhou et al., NeurIPS 2023, arXiv:2307.08286), for models of different
tasks cross-task linearity (Zhou et al., arXiv:2402.03660), with coefficients (1 − Tλ, λ … λ) over base and
experts it is task arithmetic in feature space. Per example, with f the mixed network's feature, m the mixture:

    cosine ⟨f, m⟩ / ‖f‖‖m‖      scale c = ⟨f, m⟩ / ‖m‖²      baseline: cosine of the most unlike pair of models

High cosine with c ≪ 1 is the variance collapse that REPAIR corrects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from weft.analysis.features import features
from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Network
from weft.analysis.space import affine
from weft.api import Model
from weft.errors import UsageError


@dataclass(frozen=True)
class FeatureLinearity(Finding):
    """Means over the examples, by layer."""

    models: tuple[str, ...]
    coefficients: tuple[float, ...]
    layers: tuple[str, ...]
    cosine: tuple[float, ...]
    scale: tuple[float, ...]
    baseline: tuple[float, ...]
    """How alike the features of the most unlike two models are by themselves."""

    about: ClassVar[str] = (
        "Features of the mixed network against the mixture of the models' features, layer by layer: cosine and "
        "scale are 1 where the network is linear in its weights (LLFC, arXiv:2307.08286; across tasks CTL, "
        "arXiv:2402.03660). The baseline is the cosine between the models themselves."
    )

    @property
    def title(self) -> str:
        return f"Layer-wise feature linearity of {' and '.join(self.models)}"

    @property
    def headline(self) -> str:
        low = min(range(len(self.layers)), key=lambda i: self.cosine[i])
        return (f"cosine at least {self.cosine[low]:.4f} (at {self.layers[low]}), scale at least "
                f"{min(self.scale):.4f}; between the models {min(self.baseline):.4f}")  # fmt: skip

    def plot(self) -> Any:
        made = figure("at the input of", "mean over examples")
        for name, values in (
            ("cosine", self.cosine),
            ("scale c", self.scale),
            ("between the models", self.baseline),
        ):
            made.add_trace(graphs().Scatter(x=self.layers, y=values, name=name, mode="lines+markers"))
        made.update_xaxes(type="category")
        return made


def feature_linearity(
    net: Network,
    models: Sequence[Model],
    coefficients: Sequence[float] | None = None,
    *,
    names: Sequence[str] | None = None,
) -> FeatureLinearity:
    """Compare features at Σ cᵢθᵢ with Σ cᵢ f(θᵢ), by default with equal coefficients.

    Layers whose features are the same in all models (the input) are left out. Raises UsageError for fewer than two
    models or another number of coefficients.
    """
    if len(models) < 2:
        raise UsageError("linearity of features needs at least two models")
    c = [1.0 / len(models)] * len(models) if coefficients is None else [float(v) for v in coefficients]
    states = net.states(models)
    mixed = features(net, net.settled(affine(c, states)))
    single = [features(net, s) for s in states]
    layers, found = [], []
    for layer, f in mixed.items():
        own = [s[layer].flatten(1).double() for s in single]
        if all(bool((o == own[0]).all()) for o in own):
            continue
        layers.append(layer)
        found.append(_alike(f.flatten(1).double(), own, c))
    columns = zip(*found, strict=True) if found else ((), (), ())
    cosine, scale, baseline = (tuple(float(v) for v in column) for column in columns)
    labels = tuple(names) if names is not None else tuple(f"model {i}" for i in range(len(models)))
    return FeatureLinearity(labels, tuple(c), tuple(layers), cosine, scale, baseline)


def _alike(f: Tensor, own: Sequence[Tensor], c: Sequence[float]) -> tuple[float, float, float]:
    """Cosine, scale and baseline of one layer; f: [n, d]."""
    mixture = sum((w * o for w, o in zip(c, own, strict=True)), torch.zeros_like(f))
    squares = mixture.square().sum(1)
    scale = torch.where(squares > 0, (f * mixture).sum(1) / squares.clamp(min=1e-300), 0.0)
    baseline = min(float(cosine_similarity(x, y).mean()) for x, y in combinations(own, 2))
    return float(cosine_similarity(f, mixture).mean()), float(scale.mean()), baseline
