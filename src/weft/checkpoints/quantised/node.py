"""`Dequantised`: the node that shows values where a file holds codes.

What differs between the schemes is only how a range of one weight is computed from the stored tensors it is
made of (`Coded`). Everything else, reading by range included, is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.ranges import element_range
from weft.late import Tensor, torch

Part = Callable[[str, int, int | None], Tensor]
"""Reads elements `[start, stop)` of a stored tensor, flattened."""

CONFIG_KEYS = ("quantization_config", "compression_config")


class Coded(Protocol):
    """One weight as a scheme stores it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The stored tensors the values are computed from, which are hidden."""

    @property
    def grain(self) -> int:
        """Elements that are computed together; 1 where any range may be read."""

    @property
    def scattered(self) -> bool:
        """True where the codes of a range of values lie all over the stored tensor."""

    def values(self, part: Part, start: int, stop: int) -> Tensor:
        """The values of a (not empty) flat range, float64."""


class Dequantised(Checkpoint):
    """A checkpoint whose coded weights are shown as values; codes, scales and the like are hidden.

    Values are computed in float64 and rounded once: to the dtype asked for, else to float32. The storage dtype
    they are shown with is the one config.json states.
    """

    def __init__(
        self, model: Checkpoint, coded: Mapping[str, Coded], hidden: Sequence[str], dtype: torch.dtype
    ) -> None:
        self.origin = model.origin
        self._model, self._coded = model, dict(coded)
        parts = {part: name for name, weight in coded.items() for part in weight.parts}
        gone = {*parts, *hidden}
        keys = [f"config.json: {key}" for key in CONFIG_KEYS if key in (model.config or {})]
        self.skipped = sorted(gone - coded.keys()) + keys
        """What means nothing once the weights are values: scales, zero points, the config's account of them."""
        self._tensors: dict[str, TensorInfo] = {}
        for stored, info in model.tensors.items():
            # a weight stands where the first of its parts stood
            name = parts.get(stored, stored)
            if name in self._coded:
                self._tensors.setdefault(name, TensorInfo(self._coded[name].shape, dtype))
            elif stored not in gone:
                self._tensors[stored] = info
        self._held: dict[str, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": {}}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        weight = self._coded.get(name)
        if weight is None:
            return self._model.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, weight.grain)
        if start == stop:
            return torch.empty(0, dtype=dtype or torch.float32)
        held = self._held.get(name, {})

        def part(stored: str, first: int = 0, last: int | None = None) -> Tensor:
            if stored in held:
                return held[stored][first:last]
            return self._model.read(stored, first, last)

        values = weight.values(part, start, stop)
        return values.float() if dtype is None else round_to(values, dtype)

    def grain(self, name: str) -> int:
        return self._coded[name].grain if name in self._coded else self._model.grain(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if name not in self._coded:
            self._model.prefetch(name, start, stop)
            return
        for part in self._coded[name].parts:
            self._model.prefetch(part)

    def bytes_read(self, name: str) -> int:
        if name not in self._coded:
            return self._model.bytes_read(name)
        return self._stored(name)

    def _stored(self, name: str) -> int:
        return sum(self._model.info(p).nbytes for p in self._coded[name].parts)

    def working_bytes(self, name: str, count: int) -> int:
        if name not in self._coded:
            return self._model.working_bytes(name, count)
        # codes, factors and values of the whole rows the range touches, at most 64 bytes an element
        columns = self._coded[name].shape[-1] if self._coded[name].shape else 1
        scattered = self._coded[name].scattered
        touched = min(count + (64 if scattered else 2) * columns, self.info(name).numel)
        return 64 * touched + (2 * self._stored(name) if scattered else 0)

    def held_bytes(self, name: str) -> int:
        coded = self._coded.get(name)
        return self._stored(name) if coded is not None and coded.scattered else 0

    def hold(self, name: str) -> None:
        """Keep the codes in memory, since every range of the weight needs to look through them."""
        coded = self._coded.get(name)
        if coded is not None and coded.scattered:
            self._held[name] = {part: self._model.read(part) for part in coded.parts}

    def release(self, name: str) -> None:
        self._held.pop(name, None)

    @property
    def aliases(self) -> Mapping[str, str]:
        found = self._model.aliases
        return {a: t for a, t in found.items() if a not in self._tensors and t in self._tensors}

    @property
    def config(self) -> Mapping[str, Any] | None:
        config = self._model.config
        return config and {k: _without(v) for k, v in config.items() if k not in CONFIG_KEYS}

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self._model.assets

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self._model.files

    def identity(self) -> str | None:
        # how codes are read is stated in config.json, which is no weight file
        inner = self._model.identity()
        return inner and f"Dequantised({self._coded}, {inner})"


def _without(value: Any) -> Any:
    """A part's config (a multimodal model's text_config) without its account of the quantisation."""
    if isinstance(value, Mapping) and any(key in value for key in CONFIG_KEYS):
        return {k: v for k, v in value.items() if k not in CONFIG_KEYS}
    return value


def stated_dtype(config: Mapping[str, Any], otherwise: torch.dtype) -> torch.dtype:
    """The dtype config.json states for the values; that of the scales if it states none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            named = str(part.get("dtype", part.get("torch_dtype"))).removeprefix("torch.")
            known = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
            if named in known:
                return known[named]
    plain = is_mergeable(otherwise) and otherwise.itemsize == 2
    return otherwise if plain else torch.bfloat16
