"""`Reduced`: a mixture with fewer experts, as a lazy checkpoint.

Per layer, experts that do alike are clustered (`cluster.py`) and each cluster becomes one expert and one router
row (`fuse.py`); or the least used are dropped. A layer is worked out when its first tensor is read. A cluster of
one is read straight through, so nothing is rounded that is not merged.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any, Literal

import torch
from torch import Tensor

from weft.checkpoints.assembled import Assembled
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import executing, execution, map_here
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range
from weft.errors import UsageError
from weft.llm.moe.blocks import Block, blocks_of, rearranged, view
from weft.llm.moe.cluster import TOKENS, evenly, outputs, probes, ward
from weft.llm.moe.fuse import fused_expert, fused_rows
from weft.llm.moe.measure import gates_of, router_of
from weft.llm.moe.routing import routing_of

How = Literal["frequency", "mean", "lstsq", "drop"]
KEPT = 1 << 30
"""Bytes of merged experts that are kept for the next read."""
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_k", "num_experts_per_token")


@dataclass(frozen=True)
class _Plan:
    """What becomes of one mixture."""

    clusters: list[list[int]]
    share: Tensor
    """q `[experts]`: each expert's share in its cluster."""
    routers: dict[str, Tensor]
    """The new router tensors."""
    singles: Assembled
    """The parts of experts that stand alone, as `{cluster}/{part}`."""
    x: Tensor | None
    gates: Tensor | None


class Reduced(Derived):
    """See `weft.llm.moe.reduce.reduce_experts`, which checks the arguments."""

    def __init__(
        self,
        model: Checkpoint,
        n: int,
        how: How,
        inputs: Mapping[str, Tensor] | None,
        usage: Mapping[str, Tensor] | None,
        experts_per_token: int | None,
        align: bool,
        ridge: float,
        seed: int,
    ) -> None:
        super().__init__(model)
        self.n, self.how, self.align, self.ridge, self.seed = n, how, align, ridge, seed
        self.experts_per_token = experts_per_token
        self._given, self._usage = inputs, usage
        self.origin = f"{model.origin} with {n} experts"
        self._blocks = blocks_of(model)
        self._tensors: dict[str, TensorInfo] = {}
        self._block: dict[str, int] = {}
        self._part: dict[str, tuple[str, int | None]] = {}
        """Expert tensors → part, and the cluster it belongs to (None where fused)."""
        self._lay_out()
        self._plans: dict[int, _Plan] = {}
        self._merged: OrderedDict[tuple[int, int], dict[str, Tensor]] = OrderedDict()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_merged")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._merged, self._lock = OrderedDict(), threading.RLock()

    def _lay_out(self) -> None:
        """Names and shapes of the result, in the model's order."""
        gone: set[str] = set()
        shapes: dict[str, tuple[int, ...]] = {}
        for i, block in enumerate(self._blocks):
            for part in block.experts.parts:
                names = block.names(part)
                gone |= set(names[self.n :])
                for c, name in enumerate(names[: self.n]):
                    self._block[name] = i
                    self._part[name] = (part, None if block.experts.fused else c)
                    if block.experts.fused:
                        shapes[name] = (self.n, *block.model.info(name).shape[1:])
            for name, axis in block.routers.items():
                shape = block.model.info(name).shape
                self._block[name] = i
                shapes[name] = (*shape[:axis], self.n, *shape[axis + 1 :])
        self._tensors = {
            name: TensorInfo(shapes.get(name, info.shape), info.dtype)
            for name, info in self.first.tensors.items()
            if name not in gone
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def config(self) -> Mapping[str, Any] | None:
        given = self.first.config
        return None if given is None else self._configured(given)

    def _configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in config.items():
            if isinstance(value, Mapping):
                made[key] = self._configured(value)
            elif key in _COUNTS and value == self._blocks[0].count:
                made[key] = self.n
            elif key in _TOP_K and isinstance(value, int):
                made[key] = self.experts_per_token or min(value, self.n)
            else:
                made[key] = value
        return made

    def clusters(self) -> dict[str, list[list[int]]]:
        """Which experts became one, by mixture prefix."""
        return {b.prefix: self._plan(i).clusters for i, b in enumerate(self._blocks)}

    # -- working it out, a layer at a time ---------------------------------------------------------

    def _plan(self, index: int) -> _Plan:
        with self._lock:
            if index not in self._plans:
                # a helping thread must not come back here and wait for itself
                with executing(replace(execution(), map=map_here)):
                    self._plans[index] = self._planned(self._blocks[index])
            return self._plans[index]

    def _planned(self, block: Block) -> _Plan:
        x = None if self._given is None else self._given[block.prefix]
        usage = self._usage_of(block)
        if self.how == "drop":
            kept = sorted(usage.argsort(descending=True, stable=True)[: self.n].tolist())
            whole = Assembled(rearranged(block, kept))
            for name in block.routers:
                whole.ready(name)
            routers = {name: whole.tensor(name) for name in block.routers}
            share = torch.ones(block.count, dtype=torch.float64)
            return _Plan([[e] for e in kept], share, routers, self._singles(block, [[e] for e in kept]),
                         None, None)  # fmt: skip
        routing = routing_of(block.model.config)
        clusters = self._clustered(block, x, usage)
        share = torch.zeros(block.count, dtype=torch.float64)
        for members in clusters:
            mass = usage[members]
            share[members] = mass / mass.sum() if mass.sum() > 0 else 1 / len(members)
        rows, bias, correction = router_of(block)
        fit = evenly(x, 4 * TOKENS) if x is not None and self.how == "lstsq" else None
        new = fused_rows(rows, bias, correction, clusters, share, routing, x=fit, ridge=self.ridge)
        gates = None if fit is None else gates_of(block, fit)
        return _Plan(
            clusters, share, _router_tensors(block, *new), self._singles(block, clusters), fit, gates
        )

    def _usage_of(self, block: Block) -> Tensor:
        if self._usage is None or self.how == "mean":
            return torch.ones(block.count, dtype=torch.float64)
        usage = torch.as_tensor(self._usage[block.prefix], dtype=torch.float64)
        if usage.shape != (block.count,) or bool((usage < 0).any()):
            raise UsageError(f"usage of {block.prefix} must be {block.count} shares, none of them negative")
        return usage

    def _clustered(self, block: Block, x: Tensor | None, usage: Tensor) -> list[list[int]]:
        if self.n == block.count:
            return [[e] for e in range(block.count)]
        roles = block.roles()
        assert roles is not None
        routing = routing_of(block.model.config)
        seen = probes(block, roles["down"][0], self.seed) if x is None else evenly(x)
        features = outputs(block, seen, routing)
        size = block.count // routing.groups
        found = []
        for g in range(routing.groups):  # experts of one group only, so that the groups stay groups
            own = slice(g * size, (g + 1) * size)
            for members in ward(features[own], usage[own], self.n // routing.groups):
                found.append([g * size + e for e in members])
        return found

    def _singles(self, block: Block, clusters: list[list[int]]) -> Assembled:
        spans = {f"{c}/{part}": block.part(part, members[0])
                 for c, members in enumerate(clusters) if len(members) == 1
                 for part in block.experts.parts}  # fmt: skip
        return view(spans or {"none": block.part(block.experts.parts[0], 0)})

    def _cluster(self, index: int, c: int) -> dict[str, Tensor]:
        """gate, up and down of one cluster; the last ones are kept, since their parts are read in turn."""
        with self._lock:
            key, plan = (index, c), self._plan(index)
            if key not in self._merged:
                members = plan.clusters[c]
                with executing(replace(execution(), map=map_here)):
                    self._merged[key] = fused_expert(
                        self._blocks[index], members, plan.share[members],
                        routing_of(self._blocks[index].model.config), align=self.align,
                        x=plan.x, gates=plan.gates, ridge=self.ridge,
                    )  # fmt: skip
                size = sum(w.nbytes for w in self._merged[key].values())
                while len(self._merged) > 1 and len(self._merged) * size > KEPT:
                    self._merged.popitem(last=False)
            self._merged.move_to_end(key)
            return self._merged[key]

    # -- reading -----------------------------------------------------------------------------------

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        if name not in self._block:
            return self.first.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, 1)
        index = self._block[name]
        if name not in self._part:
            values = self._plan(index).routers[name].reshape(-1)[start:stop]
            return values if dtype is None else round_to(values.double(), dtype)
        part, cluster = self._part[name]
        if cluster is not None:
            return self._piece(index, cluster, part, start, stop, dtype)
        length = info.numel // self.n
        pieces = []
        for c in range(start // length, -(-stop // length)):
            first, last = max(start, c * length) - c * length, min(stop, (c + 1) * length) - c * length
            pieces.append(self._piece(index, c, part, first, last, dtype))
        wide = torch.float64 if any(p.dtype == torch.float64 for p in pieces) else info.dtype
        return (
            torch.cat([p.to(dtype or wide) for p in pieces]) if pieces else torch.empty(0, dtype=info.dtype)
        )

    def _piece(
        self, index: int, c: int, part: str, start: int, stop: int, dtype: torch.dtype | None
    ) -> Tensor:
        """Elements of one part of one new expert."""
        plan = self._plan(index)
        if len(plan.clusters[c]) == 1:
            return plan.singles.read(f"{c}/{part}", start, stop, dtype=dtype)
        made = self._cluster(index, c)
        roles = self._blocks[index].part_roles(part)
        values = torch.cat([made[role].reshape(-1) for role in roles])[start:stop]
        return values if dtype is None else round_to(values, dtype)

    def grain(self, name: str) -> int:
        if name not in self._part:
            return 1 if name in self._block else self.first.grain(name)
        kin = self._blocks[self._block[name]].names(self._part[name][0])
        return min(lcm(*(self.first.grain(n) for n in kin)), max(1, self.info(name).numel))

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if name not in self._block:
            self.first.prefetch(name, start, stop)

    def ready(self, name: str) -> None:
        if name not in self._block:
            self.first.ready(name)
            return
        plan = self._plan(self._block[name])
        if name in self._part:
            for single in plan.singles:
                plan.singles.ready(single)

    def held_bytes(self, name: str) -> int:
        return 0 if name in self._block else self.first.held_bytes(name)

    def hold(self, name: str) -> None:
        if name not in self._block:
            self.first.hold(name)

    def release(self, name: str) -> None:
        if name not in self._block:
            self.first.release(name)

    def bytes_read(self, name: str) -> int:
        if name not in self._part:
            return self.first.bytes_read(name)
        # experts are read once to be clustered and once to be merged
        return round(2 * self.first.bytes_read(name) * self._blocks[0].count / self.n)

    def working_bytes(self, name: str, count: int) -> int:
        if name not in self._part:
            return self.first.working_bytes(name, count) if name not in self._block else 16 * count
        block = self._blocks[self._block[name]]
        hidden, wide = (block.roles() or {"down": (0, 0)})["down"]
        one = 3 * hidden * wide
        merging = 40 * one + 16 * wide * wide + 8 * block.count * TOKENS * hidden
        return self.first.working_bytes(name, min(count, self.first.info(name).numel)) + 16 * count + merging

    def identity(self) -> str | None:
        inner = super().identity()
        told = (self.n, self.how, self.experts_per_token, self.align, self.ridge, self.seed)
        return inner and f"{told}{_digest(self._given)}{_digest(self._usage)}{inner}"


def _router_tensors(
    block: Block, rows: Tensor, bias: Tensor | None, correction: Tensor | None
) -> dict[str, Tensor]:
    """The new values under the router's names and in its shapes."""
    made: dict[str, Tensor] = {}
    values = {"rows": rows, "bias": bias, "correction": correction}
    for name, axis in block.routers.items():
        shape, new = block.model.info(name).shape, values[block.router_kind(name)]
        assert new is not None
        made[name] = new.reshape((*shape[:axis], len(rows), *shape[axis + 1 :]))
    return made


def _digest(tensors: Mapping[str, Tensor] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted((tensors or {}).items()):
        digest.update(name.encode())
        digest.update(torch.as_tensor(values).double().contiguous().numpy().tobytes())
    return digest.hexdigest()
