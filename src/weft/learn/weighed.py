"""`Weighed`: coefficients over a partition of the parameters, under a constraint, as trainable numbers.

    θ(λ) = θ0 + Σᵢ λᵢ ⊙ (θᵢ − θ0)      (Σᵢ λᵢ ⊙ θᵢ without a base),   λ = constraint(φ)

A way to merge (`Way`) is what `Mergeable` learns: its parameters, the weights they stand for, and the lazy
checkpoint of these weights. This is one; `Masked` and `ByMethod` are others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError
from weft.learn.constraints import Affine, Constraint, Simplex, as_constraint
from weft.learn.parts import Parts, Place, as_table, place_of, table_shapes
from weft.learn.sources import Sources
from weft.learn.weighted import Entry, Weighted

Taken = Mapping[str, tuple[Checkpoint, str]]


class Way(Protocol):
    """What can be learned about a merge; an nn.Module."""

    sources: Sources
    names: list[str]

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def weights(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """θ by parameter of the module, float32 at least; differentiable in the way's parameters."""
        ...

    def project(self) -> None:
        """Bring the parameters back to where they may be, after a step."""
        ...

    def coefficients(self) -> dict[str, Tensor]:
        """What has been learned, by key."""
        ...

    def checkpoint(self, taken: Taken) -> Checkpoint:
        """The merge as it is, lazily; `taken` holds tensors of one task."""
        ...


class Weighed(nn.Module):
    """See the module's docstring. `start`: one number, one a model, or tables by key."""

    def __init__(
        self,
        sources: Sources,
        names: list[str],
        parts: Parts = "model",
        constraint: str | Constraint = "free",
        start: float | list[float] | Tensor | Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sources, self.names, self.parts = sources, names, parts
        self.constraint = as_constraint(constraint)
        k = len(sources.models)
        self.places = {n: place_of(n, sources.parameters[n].shape, parts) for n in names}
        shapes = table_shapes(list(self.places.values()), k)
        wide = any(i.dtype == torch.float64 for i in sources.parameters.values())
        dtype = torch.float64 if wide else torch.float32
        if start is None:
            shares = isinstance(self.constraint, Simplex | Affine)
            start = 1 / k if sources.base is None or shares else 0.3
        if isinstance(start, Mapping) and start.keys() != shapes.keys():
            raise UsageError(
                f"the coefficients to start from are for other parts: {sorted(start.keys() ^ shapes.keys())[:5]}"
            )
        self.keys = list(shapes)
        made = []
        for key, shape in shapes.items():
            table = as_table(start[key] if isinstance(start, Mapping) else start, shape, dtype)
            made.append(self.constraint.start(key, table).to(sources.device))
        self.phi = nn.ParameterList(made)

    def tables(self) -> dict[str, Tensor]:
        """λ by key, [k, …]; differentiable."""
        return {key: self.constraint(key, phi) for key, phi in zip(self.keys, self.phi, strict=True)}

    def weights(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        tables = self.tables()
        wanted = self.names if names is None else list(names)
        return {n: self.sources.combined(n, self.places[n], tables[self.places[n].key]) for n in wanted}

    def project(self) -> None:
        with torch.no_grad():
            for phi in self.phi:
                self.constraint.project(phi)

    @torch.no_grad()
    def coefficients(self) -> dict[str, Tensor]:
        return {key: table.detach().cpu().clone() for key, table in self.tables().items()}

    def checkpoint(self, taken: Taken, masks: Mapping[str, Tensor] | None = None) -> Checkpoint:
        tables = self.coefficients()
        table_of = {n: (p, tables[p.key]) for n, p in self.places.items()}
        return weighted(self.sources, table_of, taken, masks or {})

    def recipe(self, base: str | None, models: Sequence[str] | None) -> dict[str, Any]:
        """The same merge as a recipe, with references to the base and the models.

        UsageError where a tensor has more than one coefficient: then save the checkpoint.
        """
        if any(not p.whole for p in self.places.values()):
            raise UsageError("coefficients within a tensor do not fit a recipe: save the checkpoint instead")
        tables = self.coefficients()
        anchor, k = self.sources.all[0], len(self.sources.models)
        rows: dict[str, list[float]] = {}
        for name in anchor:
            rows[name] = [0.0] * k if self.sources.base is not None else [1.0, *[0.0] * (k - 1)]
        for name in self.sources.buffers:
            rows[self.sources.stored(anchor, name) or name] = [1 / k] * k
        for name, place in self.places.items():
            rows[self.sources.stored(anchor, name) or name] = tables[place.key].double().tolist()
        same = len({tuple(r) for r in rows.values()}) == 1
        base, models = self.sources.called(base, models)
        listed = []
        for i, ref in enumerate(models):
            rules = [{"pattern": n, "value": r[i]} for n, r in rows.items()]
            listed.append({"model": ref, "parameters": {"weight": rules[0]["value"] if same else rules}})
        if self.sources.base is None:
            return {"merge_method": "linear", "parameters": {"normalize": False}, "models": listed}
        return {"merge_method": "task_arithmetic", "base_model": base, "models": listed}


def weighted(
    sources: Sources,
    tables: Mapping[str, tuple[Place, Tensor]],
    taken: Taken,
    masks: Mapping[str, Tensor],
) -> Weighted:
    """The lazy checkpoint of coefficients [k, …] by parameter; float buffers are the mean of the models'."""
    anchor, k = sources.all[0], len(sources.models)
    made = dict(tables)
    for name, info in sources.buffers.items():
        made[name] = place_of(name, info.shape, "tensor"), torch.full((k,), 1 / k, dtype=torch.float64)
    entries = {}
    for name, (place, table) in made.items():
        names = tuple(sources.stored(s, name) or name for s in sources.all)
        entries[sources.stored(anchor, name) or name] = Entry(place, table, names, masks.get(name))
    return Weighted(sources.base, sources.models, entries, taken)
