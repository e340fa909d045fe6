"""Concrete subspaces: one mask over all task vectors, learned (Tang et al., arXiv:2312.06173).

    m = σ((log u − log(1 − u) + x) / t),  u ~ U(0, 1),  m̂ = m / mean(m) by tensor,  θ = θ0 + m̂ ⊙ Σᵢ λᵢ τᵢ

`concrete` learns the logits x by a loss without labels: alone with fixed λ (Concrete TA), or in two levels, so that
the mask is good for λ after a step of AdaMerging (Concrete AM, first order), and then λ with a mask that stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError
from weft.learn.data import feeds
from weft.learn.loop import TEST_TIME, Learned, check_gradients, descend, learn, seeded
from weft.learn.losses import Loss, as_loss
from weft.learn.mergeable import Mergeable
from weft.learn.parts import Parts
from weft.learn.sources import Sources
from weft.learn.weighed import Taken, Weighed


class Masked(nn.Module):
    """A `Weighed` merge under a Concrete mask, drawn anew for every call of `weights` until it is `fixed`."""

    def __init__(self, inside: Weighed, temperature: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if inside.sources.base is None:
            raise UsageError("a mask is over task vectors: give a base")
        if temperature <= 0:
            raise UsageError(f"the temperature must be above 0, not {temperature}")
        self.inside, self.temperature = inside, temperature
        self.sources, self.names = inside.sources, inside.names
        self._generator = torch.Generator().manual_seed(seed)
        shapes = {n: self.sources.parameters[n].shape for n in self.names}
        self.logits = nn.ParameterList(torch.zeros(s, device=self.sources.device) for s in shapes.values())
        self.fixed: dict[str, Tensor] | None = None
        self.through = True
        """Whether the gradient reaches the logits."""

    def sample(self) -> dict[str, Tensor]:
        """m̂ by parameter, of mean 1 in every tensor; differentiable in the logits."""
        made = {}
        for name, x in zip(self.names, self.logits, strict=True):
            u = torch.rand(x.shape, generator=self._generator).clamp(1e-6, 1 - 1e-6).to(x.device)
            m = ((u.log() - (-u).log1p() + x) / self.temperature).sigmoid()
            made[name] = m / m.mean()
        return made

    @torch.no_grad()
    def fix(self) -> None:
        """Draw a mask that stays; the logits are then no longer trained."""
        self.fixed = {n: m.detach() for n, m in self.sample().items()}
        self.logits.requires_grad_(False)

    def weights(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        masks = self.sample() if self.fixed is None else self.fixed
        made = {}
        for name, theta in self.inside.weights(names).items():
            base = self.sources.value(None, name).to(theta.dtype)
            mask = masks[name] if self.through else masks[name].detach()
            made[name] = base + mask.to(theta.dtype) * (theta - base)
        return made

    def project(self) -> None:
        self.inside.project()

    def coefficients(self) -> dict[str, Tensor]:
        return self.inside.coefficients()

    def checkpoint(self, taken: Taken) -> Checkpoint:
        if self.fixed is None:
            raise UsageError("the mask is still random: fix it before the merge is saved (merged.way.fix())")
        masks = {n: m.detach().cpu() for n, m in self.fixed.items()}
        return self.inside.checkpoint(taken, masks)


def concrete(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    adaptive: bool = False,
    tasks: Sequence[str],
    loss: str | Loss = "entropy",
    scale: float = 0.3,
    parts: Parts = "tensor",
    steps: int = 2000,
    lr: float = 1e-3,
    inner_lr: float = 1.0,
    then_steps: int = 1000,
    then_lr: float = 1e-3,
    temperature: float = 0.5,
    batch: int = 16,
    seed: int = 0,
    split: str = TEST_TIME,
    **how: Any,
) -> Learned:
    """Concrete TA (λ = `scale` throughout) or, with `adaptive`, Concrete AM; `how` goes to `Mergeable`.

    Two levels, every step: λ starts at `scale`; one step of Adam (rate `inner_lr`, clamped to [0, 1]) on λ with the
    mask held, on a first batch; then a step on x with that λ held, on a second. Afterwards a mask is drawn and
    stays, and λ has `then_steps` of AdaMerging under it.
    """

    def way(sources: Sources, names: list[str]) -> Masked:
        return Masked(Weighed(sources, names, parts, "box", scale), temperature, seed)

    merged = Mergeable(module, base, models, tasks=tasks, way=way, **how)
    masked = merged.way
    assert isinstance(masked, Masked)
    if not adaptive:
        masked.inside.requires_grad_(False)
        found = learn(merged, loss, data, steps=steps, lr=lr, batch=batch, seed=seed, split=split)
        masked.fix()
        return found
    history = _two_levels(merged, masked, as_loss(loss), data, scale, steps, lr, inner_lr, batch, seed)
    masked.fix()
    _reset(masked.inside, scale)
    found = learn(merged, loss, data, steps=then_steps, lr=then_lr, batch=batch, seed=seed, split=split)
    found.losses[:0] = history
    return found


def _two_levels(
    merged: Mergeable, masked: Masked, loss: Loss, data: Any, scale: float, steps: int, lr: float, inner_lr: float,
    batch: int, seed: int,
) -> list[float]:  # fmt: skip
    streams = {t: iter(f) for t, f in feeds(data, merged.tasks, batch, seed, masked.sources.device).items()}
    logits, weights = list(masked.logits), list(masked.inside.parameters())
    outer, history = torch.optim.Adam(logits, lr=lr), []
    with seeded(seed, masked.sources.device):
        for step in range(1, steps + 1):
            _reset(masked.inside, scale)
            masked.through = False
            inner = torch.optim.Adam(weights, lr=inner_lr)
            inner.zero_grad()
            descend(merged, loss, {t: next(s) for t, s in streams.items()}, step)
            check_gradients(weights, step)
            inner.step()
            merged.project()
            masked.through = True
            masked.inside.requires_grad_(False)
            outer.zero_grad()
            history.append(descend(merged, loss, {t: next(s) for t, s in streams.items()}, step))
            check_gradients(logits, step)
            outer.step()
            masked.inside.requires_grad_(True)
    return history


@torch.no_grad()
def _reset(inside: Weighed, scale: float) -> None:
    for phi in inside.phi:
        phi.fill_(scale)
