"""`Adapted`: a base with a LoRA over it, as one lazy checkpoint.

The update of a row costs one row of one factor and the whole of the other, both small, so an adapted model
of any size streams like the base alone. Names that were tied and are no longer equal come apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from weft.checkpoints.adapters import Lora
from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.fitting import fit, is_transposed, scaled_axis
from weft.checkpoints.ranges import element_range
from weft.checkpoints.updates import Experts, Pair, Update
from weft.late import Tensor, torch

_BLOCK = 1 << 22
"""Elements of the base that the first pass of a transposed DoRA holds at once."""


class Adapted(Checkpoint):
    """`W + scale · B A` where the adapter has an update, its own tensor where it has one, else the base.

    (IA)³ multiplies rows or columns; DoRA (2402.09353) gives each output the length m: m · (W + BA) / ‖W + BA‖.
    """

    def __init__(self, base: Checkpoint, lora: Lora, origin: str | None = None) -> None:
        self.origin = origin or f"{base.origin}+{lora.origin}"
        self.base, self.lora = base, fit(lora, base)
        self._modules, self._biases = self.lora.modules, self.lora.biases
        self._replaced = self.lora.replaced
        self._scalings = dict(self.lora.scalings)
        for name, scaling in self.lora.scalings.items():
            bias = name.removesuffix(".weight") + ".bias"
            if not scaling.inner and bias in base:
                self._scalings[bias] = scaling
        changed = {*self._modules, *self._biases, *self._replaced, *self._scalings}
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
        self._remember()

    def _remember(self) -> None:
        # the engine reads a weight in many ranges; its factors are read from disk once
        self._factors = lru_cache(maxsize=32)(self._read_factors)
        self._lengths = lru_cache(maxsize=32)(self._measure_lengths)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_factors", "_lengths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def identity(self) -> str | None:
        # the scales stand in adapter_config.json, which is no weight file
        inner = super().identity()
        return inner and f"{dict(self._modules)}{dict(self._scalings)}{inner}"

    def grain(self, name: str) -> int:
        """One row where the update is expanded or inputs are scaled, else the base's grain."""
        info = self.info(name)
        source, key = self._source(name)
        inherited = source.grain(key)
        if name not in self._modules and name not in self._scalings:
            return inherited
        row = self._width(name)
        return row if row % inherited == 0 else max(info.numel, 1)

    def _width(self, name: str) -> int:
        """Elements of a row as updates see it: what follows the first axis, or the last axis of a stack."""
        shape = self.info(name).shape
        if isinstance(self._modules.get(name), Experts):
            return max(shape[-1], 1)
        return max(self.info(name).numel // max(shape[0], 1), 1)

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
        if name not in self._modules and name not in self._biases and name not in self._scalings:
            return source.read(key, start, stop, dtype=dtype)
        values = source.read(key, start, stop).to(torch.float64)
        if stop > start and name in self._modules:
            values = self._expanded(name, values, start)
        if name in self._biases:
            bias, factor = self._biases[name]
            values = values + factor * self.lora.weights.read(bias, start, stop).to(torch.float64)
        if name in self._scalings:
            values = self._scaled(name, values, start)
        return values if dtype is None else round_to(values, dtype)

    def _expanded(self, name: str, values: Tensor, start: int) -> Tensor:
        """The rows from `start` with the update of each slice that they lie in."""
        update, width = self._modules[name], self._width(name)
        weight = values.reshape(-1, width)
        first, last = start // width, start // width + len(weight)
        each = self.info(name).numel // width // update.count
        turned = self._turned(name)
        parts = []
        for index in range(first // each, -(-last // each)):
            b, a = self._factors(name, index)
            low, high = max(first - index * each, 0), min(last - index * each, each)
            parts.append(a[:, low:high].T @ b.T if turned else b[low:high] @ a)
        weight = weight + torch.cat(parts)
        if update.magnitude:
            # DoRA: the direction of each output is learned apart from its length
            magnitude = self._magnitude(update)
            if turned:
                weight = weight * (magnitude / self._lengths(name))
            else:
                weight = weight * magnitude[first:last, None] / weight.norm(dim=1, keepdim=True)
        return weight.reshape(-1)

    def _turned(self, name: str) -> bool:
        return is_transposed(self.lora, self.info(name), self._modules[name])

    def _measure_lengths(self, name: str) -> Tensor:
        """‖W + BA‖ of each output where outputs are columns: one pass over the base's rows."""
        source, key = self._source(name)
        (b, a), width = self._factors(name, 0), self._width(name)
        rows, block = self.info(name).numel // width, max(1, _BLOCK // width)
        total = torch.zeros(width, dtype=torch.float64)
        for low in range(0, rows, block):
            high = min(low + block, rows)
            weight = source.read(key, low * width, high * width).to(torch.float64).reshape(-1, width)
            total += (weight + a[:, low:high].T @ b.T).square().sum(0)
        return total.sqrt()

    def _scaled(self, name: str, values: Tensor, start: int) -> Tensor:
        shape, scaling = self.info(name).shape, self._scalings[name]
        vector = self.lora.weights.read(scaling.key).to(torch.float64)
        width = self._width(name)
        if len(shape) < 2 or scaled_axis(self.lora, shape, scaling) == 0:
            rows = values.reshape(-1, width)
            first = start // width
            return (rows * vector[first : first + len(rows), None]).reshape(-1)
        return (values.reshape(-1, shape[1], width // shape[1]) * vector[:, None]).reshape(-1)

    def _read_factors(self, name: str, index: int) -> Pair:
        return self._modules[name].factors(self.lora.weights, index)

    def _magnitude(self, update: Update) -> Tensor:
        return self.lora.weights.read(str(update.magnitude)).to(torch.float64)

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
