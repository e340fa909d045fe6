"""VaRM: models weighted by how far they moved, tensor by tensor. Wan et al. 2024, FuseChat, arXiv:2402.16107.

    vᵢ = mean (θᵢ − θ0)²        Wᵢ = vᵢ / Σⱼ vⱼ        θ = Σ Wᵢ θᵢ = θ0 + Σ Wᵢ τᵢ

One weight a tensor, or one a model (`over="model"`), or one an element. Where some vᵢ is 0 the weights are equal:
a model that did not move says nothing of who knows better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from weft.late import Tensor, torch
from weft.methods.registry import method
from weft.methods.stats import Sums
from weft.methods.step import At, Pipeline, step

Over = Literal["tensor", "model", "element"]


def _energy(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    return x.double() ** 2


def shares(energy: Tensor) -> Tensor:
    """W from v along the first axis; equal where one is 0."""
    equal = torch.full_like(energy, 1 / energy.shape[0])
    return torch.where((energy > 0).all(0), energy / energy.sum(0).clamp(min=1e-300), equal)


def _weighted(x: Tensor, energy: Tensor) -> Tensor:
    out = torch.zeros_like(x[0])
    for xi, wi in zip(x, shares(energy).to(x), strict=True):
        out = out + wi * xi
    return out


@step(stat=Sums("energy", _energy), reduces=True)
def by_energy(x: Tensor, *, energy: Tensor) -> Tensor:
    """Σ Wᵢ xᵢ with one weight a tensor; x: [k, *shape], energy: [k]."""
    return _weighted(x, energy)


@step(stat=Sums("energy", _energy, scope="model"), reduces=True)
def by_energy_of_model(x: Tensor, *, energy: Tensor) -> Tensor:
    """Σ Wᵢ xᵢ with one weight a model."""
    return _weighted(x, energy)


@step(reduces=True)
def by_energy_of_element(x: Tensor) -> Tensor:
    """Σ Wᵢ xᵢ with a weight an element."""
    return _weighted(x, x**2)


@method(space="deltas", paper="Wan et al., FuseChat, arXiv:2402.16107")
def varm(*, over: Over = "tensor") -> Pipeline:
    """Average by how far each model moved from the base: who changed a matrix most knows most of it."""
    if over == "model":
        return by_energy_of_model()
    return by_energy() if over == "tensor" else by_energy_of_element()
