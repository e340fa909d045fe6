"""AdaRank: which singular components of every task vector take part in a merge (arXiv:2503.22178).

    τᵢ = Uᵢ diag(sᵢ) Vᵢᵀ,  bᵢ = 1[xᵢ ≥ 0],  θ = θ0 + λ Σᵢ Uᵢ diag(bᵢ sᵢ) Vᵢᵀ

for every matrix (a convolution's as output units × the rest); other tensors keep λ. The gradient passes through the
step as through σ(x) (straight-through). The factors of all models are in memory, about twice the models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError
from weft.learn.loop import TEST_TIME, Learned, learn
from weft.learn.losses import Loss
from weft.learn.mergeable import Mergeable
from weft.learn.sources import Sources
from weft.learn.weighed import Taken, Weighed, weighted


class Ranked(nn.Module):
    """A `Weighed` merge whose matrices are made of chosen singular components; see the module's docstring.

    `keep` is the share of components, the largest of each model, that are chosen at the start: 1/k by default.
    """

    def __init__(self, inside: Weighed, keep: float | None = None) -> None:
        super().__init__()
        sources = inside.sources
        if sources.base is None:
            raise UsageError("singular components are of task vectors: give a base")
        keep = 1 / len(sources.models) if keep is None else keep
        if not 0 < keep <= 1:
            raise UsageError(f"keep is a share of the components, above 0 up to 1, not {keep}")
        self.inside, self.sources, self.names = inside, sources, inside.names
        self.matrices = [n for n in self.names if len(sources.parameters[n].shape) > 1]
        if not self.matrices:
            raise UsageError("there are no matrices whose components could be chosen")
        if any(not inside.places[n].whole for n in self.matrices):
            raise UsageError("components are weighed by one λ a model and matrix: choose other parts")
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        logits = []
        for n in self.matrices:
            parts = [
                torch.linalg.svd(sources.delta(i, n, torch.float64).flatten(1), full_matrices=False)
                for i in range(len(sources.models))
            ]
            wide = torch.promote_types(sources.parameters[n].dtype, torch.float32)
            self._left[n] = torch.stack([u * s for u, s, _ in parts]).to(wide)  # [k, m, r]
            self._right[n] = torch.stack([vh for *_, vh in parts]).to(wide)  # [k, r, n]
            r = parts[0][1].numel()
            order = torch.arange(r, device=sources.device).expand(len(parts), r)
            logits.append(torch.where(order < max(1, round(keep * r)), 1.0, -1.0).to(wide))
        self.logits = nn.ParameterList(logits)

    def chosen(self) -> dict[str, Tensor]:
        """b by matrix, [k, r] of 0 and 1; differentiable in the logits as σ is."""
        found = {}
        for n, x in zip(self.matrices, self.logits, strict=True):
            soft = x.sigmoid()
            found[n] = (x >= 0).to(x.dtype) + (soft - soft.detach())
        return found

    def weights(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = self.names if names is None else list(names)
        chosen, tables = self.chosen(), self.inside.tables()
        made = self.inside.weights([n for n in wanted if n not in chosen])
        for n in (n for n in wanted if n in chosen):
            c = (chosen[n] * tables[self.inside.places[n].key][:, None].to(chosen[n].dtype))[:, None]
            delta = torch.einsum("kmr,krn->mn", self._left[n] * c, self._right[n])
            base = self.sources.value(None, n)
            made[n] = base.to(delta.dtype) + delta.reshape(base.shape)
        return made

    def project(self) -> None:
        self.inside.project()

    @torch.no_grad()
    def coefficients(self) -> dict[str, Tensor]:
        """λ by key, and by matrix which components are chosen."""
        masks = {f"{n} components": (x >= 0).cpu() for n, x in zip(self.matrices, self.logits, strict=True)}
        return {**self.inside.coefficients(), **masks}

    @torch.no_grad()
    def checkpoint(self, taken: Taken) -> Checkpoint:
        """Matrices are in memory; all else is lazy."""
        held = StateDict({n: w.cpu() for n, w in self.weights(self.matrices).items()}, "chosen components")
        anchor, tables = self.sources.all[0], self.inside.coefficients()
        made = {self.sources.stored(anchor, n) or n: (held, n) for n in self.matrices}
        rest = {n: (p, tables[p.key]) for n, p in self.inside.places.items() if n not in self.matrices}
        return weighted(self.sources, rest, {**made, **taken}, {})


def adarank(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    tasks: Sequence[str],
    loss: str | Loss = "entropy",
    scale: float = 1.0,
    keep: float | None = None,
    weights: bool = False,
    steps: int = 300,
    lr: float = 0.02,
    batch: int = 16,
    seed: int = 0,
    split: str = TEST_TIME,
    validation: Any = None,
    **how: Any,
) -> Learned:
    """Learn which singular components of the task vectors to add, λ = `scale`; with `weights` λ a tensor too.

    Written from the paper's summary; the start, which is that of TSV-M, and the rate are this library's.
    """

    def way(sources: Sources, names: list[str]) -> Ranked:
        return Ranked(Weighed(sources, names, "tensor", "free", scale), keep)

    merged = Mergeable(module, base, models, tasks=tasks, way=way, **how)
    assert isinstance(merged.way, Ranked)
    merged.way.inside.requires_grad_(weights)
    return learn(
        merged, loss, data, steps=steps, lr=lr, batch=batch, seed=seed, split=split, validation=validation,
    )  # fmt: skip
