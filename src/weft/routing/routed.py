"""`Routed`: a network whose routed parts take, for each example, a shared merge and what its gate adds to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import UsageError, did_you_mean
from weft.routing.blocks import Block, maps_in
from weft.routing.gated import HOW, Gated, How, Now, at
from weft.routing.gates import entropies, pooled
from weft.routing.gating import DIRECTIONAL, Gating
from weft.routing.residuals import Residual
from weft.routing.told import mask_of, preferences, rows, size_of, task_rows
from weft.train.forward import logits_of

if TYPE_CHECKING:
    from weft.engine.save import Saved
    from weft.routing.cost import Cost
    from weft.routing.sent import Sent


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a part of the model was learned from."""

    what: str
    """gate, residuals …"""
    data: str
    """What was known of the data: unlabelled inputs by task, labels …"""
    split: str
    """The data's name; "test-time" where inputs of the test are among them."""


@dataclass(frozen=True)
class Combining:
    """How the chosen residuals become one: added up, or merged by a method on tensors."""

    method: str | None = None
    params: Mapping[str, Any] | None = None

    def __call__(self, name: str, stack: Tensor) -> Tensor:
        from weft.methods.registry import METHODS

        made: Tensor = METHODS[str(self.method)](stack, **dict(self.params or {}))
        return made


class _Seen(Exception):
    """A first pass has come to where it was going."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Routed(nn.Module):
    """Made by `weft.route` or `weft.routing.load`; called like the module it is made of.

    `forward(…, task=)` tells the task (a name, or one an example), `preference=` what is preferred (a share a
    task), `weights=` the experts' weights [T] or [B, T] in place of the gate's.
    """

    def __init__(
        self, module: nn.Module, blocks: Sequence[Block], residuals: Mapping[str, Residual], gating: Gating,
        tasks: Sequence[str], *, rest: Tensor, how: How = "auto", combining: Combining = Combining(),
        gates: Mapping[str, nn.Module] | None = None, fitted: Sequence[Fitted] = (), origin: str = "routed model",
    ) -> None:  # fmt: skip
        super().__init__()
        if how not in HOW:
            raise UsageError(f"how must be one of {', '.join(HOW)}, not {how!r}")
        self.tasks, self.combining = list(tasks), combining
        self.blocks, self.fitted, self.origin = list(blocks), list(fitted), origin
        self.kind = type(module).__name__
        first = {id(p): n for n, p in module.named_parameters()}
        self.ties = {
            n: first[id(p)] for n, p in module.named_parameters(remove_duplicate=False) if n != first[id(p)]
        }
        self.names = [n for n in module.state_dict() if n not in self.ties]
        linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        if gating.at is None and gating.scope == "model" and linears:
            gating = replace(gating, at=linears[-1])
        known = [n for n, _ in module.named_modules()]
        if gating.at is not None and gating.at not in known:
            raise UsageError(
                f"there is no submodule {gating.at!r} to look at{did_you_mean(gating.at, known)}"
            )
        self.gating, self.at = gating, gating.at
        self.register_buffer("rest", rest.float())
        self.residual_names = list(residuals)
        self.residuals = nn.ModuleList(residuals.values())
        self.gates = nn.ModuleDict()
        self.parts: list[Gated] = []
        self._sent: Sent | None = None
        self.net: nn.Module = module
        self._install(residuals, how)
        for key, gate in (gates or {}).items():
            self.set_gate(key, gate)
        self.to(self.device).eval()

    def _install(self, residuals: Mapping[str, Residual], how: How) -> None:
        combine = self.combining if self.combining.method else None
        for block in self.blocks:
            own = {n: residuals[n] for n in (*block.parameters, *block.buffers) if n in residuals}
            maps = maps_in(self.net, block, list(own))
            inner = self.net.get_submodule(block.name)
            part = Gated(inner, block, own, maps, self.rest_row, self.gating, None, how, combine)
            if self.gating.per == "token" and maps is None:
                raise UsageError(
                    f"weights per token need parts whose outputs are linear in their weights; "
                    f"{block.name or 'the whole'} is none: choose where='linear', or per='sample'"
                )
            self.parts.append(part)
        for part in self.parts:
            if not part.block.name:
                self.net = part
                continue
            parent, _, leaf = part.block.name.rpartition(".")
            self.net.get_submodule(parent)._modules[leaf] = part

    @property
    def rest_row(self) -> Tensor:
        """The weights [T] where nothing is known: with them a first pass is made."""
        return self.get_buffer("rest")

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    # -- gates -----------------------------------------------------------------------------------------

    def gate_key(self, block: Block) -> str:
        """Which gate a block asks."""
        shared = self.gating.scope == "model" or self.gating.tied
        return "all" if shared else str(self.blocks.index(block))

    def gate(self, key: str) -> nn.Module | None:
        """A gate by key: "all", or the number of its block."""
        return self.gates[key] if key in self.gates else None  # noqa: SIM401

    def set_gate(self, key: str, gate: nn.Module) -> None:
        """Put a gate in its place."""
        self.gates[key] = gate.to(self.device)
        for part in self.parts:
            if self.gate_key(part.block) == key:
                part.__dict__["gate"] = self.gates[key]

    @property
    def gate_keys(self) -> list[str]:
        """Keys of all gates that there should be; none for gates that have nothing to hold."""
        if self.gating.kind in ("oracle", "entropy"):
            return []
        return list(dict.fromkeys(self.gate_key(b) for b in self.blocks))

    # -- weights ---------------------------------------------------------------------------------------

    def _settle(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], task: Any, preference: Any, weights: Any
    ) -> Now:
        """What is known before the network runs; for gates of the whole model, their weights."""
        gating, size = self.gating, size_of(args, kwargs)
        now = Now(size, mask=mask_of(kwargs))
        if weights is not None:
            now.weights = rows(self.tasks, weights, size, "weights").to(self.device)
        elif gating.kind == "preference":
            if preference is None:
                raise UsageError(
                    f"this model is weighed by a preference: call it with preference=, a share of each of "
                    f"{', '.join(self.tasks)}"
                )
            now.preference = preferences(self.tasks, preference, size).to(self.device)
            if gating.scope == "model":
                now.weights = gating.weights(self._gate("all")(now.preference), self.rest_row, self.training)
        elif task is not None:
            told = task_rows(self.tasks, task, size).to(self.device)
            now.weights = told * (gating.scale if gating.kind == "oracle" else 1.0)
        elif gating.kind == "oracle":
            raise UsageError(f"this model has to be told the task: task= one of {', '.join(self.tasks)}")
        elif gating.scope == "model":
            scores = self.scores(args, kwargs)
            now.weights = gating.weights(scores, self.rest_row, self.training)
            if gating.per == "batch":
                now.weights = now.weights.mean(0, keepdim=True).expand_as(now.weights)
        return now

    def _gate(self, key: str) -> nn.Module:
        found = self.gate(key)
        if found is None:
            raise UsageError(
                f"the {self.gating.kind} gate has not been made: weft.routing.fit_router(…) or train(…) makes it"
            )
        return found

    def scores(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """[B, T] of a gate of the whole model."""
        if self.gating.kind == "entropy":
            return entropies([logits_of(self._at_row(t, args, kwargs)) for t in range(len(self.tasks))])
        gate = self._gate("all")
        found: Tensor = gate(self.features(args, kwargs))
        return found

    @torch.no_grad()
    def _at_row(self, t: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network as expert t has it."""
        size = size_of(args, kwargs)
        row = torch.eye(len(self.tasks), device=self.device)[t].expand(size, -1)
        with at(self.parts, Now(size, row)):
            return self.net(*args, **kwargs)

    def features(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """[B, d]: what `at` is given in a pass at the resting weights, which stops there."""
        if self.at is None:
            raise UsageError("the network has no linear layer to look at: name a submodule (at=…)")
        part = self.net.get_submodule(self.at)

        def stop(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found = next((v for v in (*given, *named.values()) if isinstance(v, Tensor)), None)
            if found is not None:
                raise _Seen(found)

        size = size_of(args, kwargs)
        hook = part.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), at(self.parts, Now(size, self.rest_row.expand(size, -1))):
                self.net(*args, **kwargs)
        except _Seen as seen:
            return self._one_each(pooled(seen.x, self._channels_at(part), mask_of(kwargs)), size)
        finally:
            hook.remove()
        raise UsageError(f"{self.at} is not called with a tensor, so nothing can be looked at there")

    def _one_each(self, x: Tensor, size: int) -> Tensor:
        if len(x) != size:
            raise UsageError(
                f"{self.at} sees {len(x)} rows for {size} examples: look at another submodule (at=…)"
            )
        return x

    def _channels_at(self, part: nn.Module) -> int:
        convolves = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in part.modules())
        return 1 if convolves else -1

    @torch.no_grad()
    def features_by_gate(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Gate → features [n, d] that it would see at the resting weights; [n·blocks, d] where blocks share it."""
        if self.gating.scope == "model":
            return {"all": self.features(args, kwargs)}
        size = size_of(args, kwargs)
        now = Now(size, self.rest_row.expand(size, -1), mask=mask_of(kwargs), features={})
        with at(self.parts, now):
            self.net(*args, **kwargs)
        assert now.features is not None
        found: dict[str, list[Tensor]] = {}
        for part in self.parts:
            if part.block.name in now.features:
                found.setdefault(self.gate_key(part.block), []).append(now.features[part.block.name])
        return {k: torch.cat(v) for k, v in found.items()}

    # -- calls -----------------------------------------------------------------------------------------

    def forward(
        self, *args: Any, task: Any = None, preference: Any = None, weights: Any = None, **kwargs: Any
    ) -> Any:
        now = self._settle(args, kwargs, task, preference, weights)
        with at(self.parts, now):
            out = self.net(*args, **kwargs)
        idle = [b.name for b in self.blocks if b.name not in now.told]
        if idle:
            raise UsageError(
                f"{idle[0]} is never called: the network uses its weights in another way, so route a part around it"
            )
        if self._sent is not None:
            self._sent.add(now)
        return out

    @torch.no_grad()
    def weights_for(
        self, *args: Any, task: Any = None, preference: Any = None, **kwargs: Any
    ) -> Tensor | dict[str, Tensor]:
        """The weights that inputs (or a task, or a preference) get: [B, T], or by block where each has its gate."""
        told = task if task is not None else preference
        if not args and not kwargs and told is not None:
            size = len(told) if isinstance(task, list | tuple) else 1
            args = (torch.zeros(size, 1, device=self.device),)
            now = self._settle(args, {}, task, preference, None)
            if now.weights is not None:
                return now.weights
            assert now.preference is not None
            r = now.preference
            return {p.block.name: p._weigh(None, now) for p in self.parts if r is not None}
        now = self._settle(args, kwargs, task, preference, None)
        if now.weights is not None:
            return now.weights
        with at(self.parts, now):
            self.net(*args, **kwargs)
        return now.told

    @contextmanager
    def watched(self) -> Iterator[Sent]:
        """Within, it is counted to which experts calls send their inputs."""
        from weft.routing.sent import Sent

        before, self._sent = self._sent, Sent(self.tasks)
        try:
            yield self._sent
        finally:
            self._sent = before

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Within, residuals that are stored in few bits are decoded once and kept, in float32."""
        for r in self.residuals:
            assert isinstance(r, Residual)
            r.unpack(True)
        try:
            yield
        finally:
            for r in self.residuals:
                assert isinstance(r, Residual)
                r.unpack(False)

    # -- results ---------------------------------------------------------------------------------------

    def value(self, name: str) -> Tensor:
        """θs of one tensor."""
        path, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.net.get_submodule(path), leaf)
        return found.detach()

    @torch.no_grad()
    def checkpoint(
        self, *, task: str | None = None, preference: Any = None, weights: Any = None
    ) -> Checkpoint:
        """The static model at fixed weights, under the module's names; with its config, if it is of transformers.

        At a task, a preference, or `weights` (one number a task, or a mapping from block to them).
        """
        given = [v for v in (task, preference, weights) if v is not None]
        if len(given) != 1:
            raise UsageError("a static model is one at a task, a preference or weights: give one of them")
        if isinstance(weights, Mapping):
            at_rows = {
                b.name: rows(self.tasks, weights[b.name], 1, f"weights of {b.name}")[0] for b in self.blocks
            }
        else:
            if weights is not None:
                found: Any = rows(self.tasks, weights, 1, "weights")
            else:
                found = self.weights_for(task=task, preference=preference)
            at_rows = {b.name: (found[b.name] if isinstance(found, dict) else found)[0] for b in self.blocks}
        state = {n: self.value(n) for n in self.names}
        for part in self.parts:
            made = part.merged(at_rows[part.block.name].to(self.device))
            dot = f"{part.block.name}." if part.block.name else ""
            state |= {dot + n: t.detach() for n, t in made.items()}
        origin = f"{self.origin} at fixed weights"
        static = StateDict(state | {a: state[n] for a, n in self.ties.items()}, origin)
        return static if self.config is None else Model(static, self.config, (), origin)

    @property
    def config(self) -> dict[str, Any] | None:
        """The network's config.json as data, where it is a model of transformers."""
        inner: Any = self.net
        found: Any = getattr(inner, "config", None)
        if found is None or not hasattr(found, "to_json_string"):
            return None
        told: dict[str, Any] = json.loads(found.to_json_string(use_diff=False))
        return told | {"architectures": [self.kind]}

    def cost(self) -> Cost:
        """Parameters, bytes, extra passes and products, what was learned from what, and what to beware of."""
        from weft.routing.cost import cost

        return cost(self)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Saved:
        """Write a folder that `weft.routing.load(path, module)` reads."""
        from weft.routing.stored import save

        return save(self, path, overwrite=overwrite)

    def directions_needed(self) -> bool:
        """Whether the gate follows from the residuals' right singular directions."""
        return self.gating.kind in DIRECTIONAL
