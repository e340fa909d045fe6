"""`Adapted`: a base with a LoRA over it, as one lazy checkpoint.

The update of a row costs one row of one factor and the whole of the other, both small, so an adapted model
of any size streams like the base alone. Names that were tied and are no longer equal come apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.adapters import Lora, LoraModule, check_shapes, is_transposed, places
from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.limits import shown
from weft.checkpoints.ranges import element_range
from weft.errors import DataProblems


class Adapted(Checkpoint):
    """`W + scale · B A` where the adapter has an update, its own tensor where it has one, else the base."""

    def __init__(self, base: Checkpoint, lora: Lora, origin: str | None = None) -> None:
        self.origin = origin or f"{base.origin}+{lora.origin}"
        self.base, self.lora = base, lora
        place = places(lora, base)
        self._modules = {place(name): module for name, module in lora.modules.items()}
        self._biases = {place(name): bias for name, bias in lora.biases.items()}
        self._replaced = {place(name): key for name, key in lora.replaced.items()}
        changed = {*self._modules, *self._biases, *self._replaced}
        self._aliases = {
            alias: name
            for alias, name in base.aliases.items()
            if alias not in changed and name not in changed
        }
        self._homes = {
            name: base.aliases.get(name, name)
            for name in (*base.tensors, *base.aliases)
            if name not in self._aliases
        }
        self._tensors = {name: base.info(home) for name, home in self._homes.items()}
        self._check()
        self._remember()

    def _remember(self) -> None:
        # the engine reads a weight in many ranges; its factors are read from disk once
        self._factor = lru_cache(maxsize=8)(self._read_factor)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_factor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def _check(self) -> None:
        problems = [
            problem
            for name, module in self._modules.items()
            if (problem := check_shapes(self.lora, name, self._tensors[name], module))
        ]
        same = [(n, key) for n, (key, _) in self._biases.items()] + list(self._replaced.items())
        for name, key in same:
            theirs, ours = self.lora.weights.info(key).shape, self._tensors[name].shape
            if theirs != ours:
                problems.append(f"{shown(name)}: the adapter has shape {list(theirs)}, the base {list(ours)}")
        problems += [
            f"{shown(name)} of the base is {self._tensors[name].dtype} and cannot be added to"
            for name in (*self._modules, *self._biases)
            if not is_mergeable(self._tensors[name].dtype)
        ]
        if problems:
            raise DataProblems(f"the adapter {self.lora.origin} does not fit {self.base.origin}", problems)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def identity(self) -> str | None:
        # the scales stand in adapter_config.json, which is no weight file
        inner = super().identity()
        return inner and f"{ {name: module.scale for name, module in self._modules.items()} }{inner}"

    def grain(self, name: str) -> int:
        """One row where the update is expanded, else the base's grain."""
        info = self.info(name)
        source, key = self._source(name)
        inherited = source.grain(key)
        if name not in self._modules:
            return inherited
        row = max(info.numel // max(info.shape[0], 1), 1)
        return row if row % inherited == 0 else max(info.numel, 1)

    def _source(self, name: str) -> tuple[Checkpoint, str]:
        """Where the values before the update are: in the adapter if it replaces them, else in the base."""
        if name in self._replaced:
            return self.lora.weights, self._replaced[name]
        return self.base, self._homes[name]

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        source, key = self._source(name)
        if name not in self._modules and name not in self._biases:
            return source.read(key, start, stop, dtype=dtype)
        values = source.read(key, start, stop).to(torch.float64)
        if name in self._biases:
            bias, factor = self._biases[name]
            values = values + factor * self.lora.weights.read(bias, start, stop).to(torch.float64)
        elif stop > start:
            values = self._expanded(name, info, values, start)
        return values if dtype is None else round_to(values, dtype)

    def _expanded(self, name: str, info: TensorInfo, values: Tensor, start: int) -> Tensor:
        module = self._modules[name]
        row = info.numel // info.shape[0]
        weight = values.reshape(-1, row)
        first, last = start // row, start // row + len(weight)
        a, b = self._factor(module.a), self._factor(module.b)
        if is_transposed(self.lora, info, module):
            weight = weight + module.scale * (a[:, first:last].T @ b.T)
        else:
            weight = weight + module.scale * (b[first:last] @ a)
        if module.magnitude:
            # DoRA: the direction of each row is learned apart from its length
            length = weight.norm(dim=1, keepdim=True)
            weight = weight * self._magnitude(module)[first:last, None] / length
        return weight.reshape(-1)

    def _read_factor(self, key: str) -> Tensor:
        """A factor as a float64 matrix, kernels flattened."""
        shape = self.lora.weights.info(key).shape
        return self.lora.weights.read(key).to(torch.float64).reshape(shape[0], -1)

    def _magnitude(self, module: LoraModule) -> Tensor:
        return self._factor(str(module.magnitude)).reshape(-1)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        source, key = self._source(name)
        source.prefetch(key, start, stop)

    @property
    def config(self) -> Mapping[str, Any] | None:
        config = self.base.config
        if config and config.get("tie_word_embeddings") and len(self._aliases) < len(self.base.aliases):
            return {**config, "tie_word_embeddings": False}
        return config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self.base.assets

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.base, self.lora.weights)
