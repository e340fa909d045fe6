"""What adapters are to the algebra: for each weight an update ΔW = B A, read as two thin matrices.

Nothing here forms ΔW (`Factors.delta` is for looking and for tests). Ranks and shapes come from headers;
values are read when they are asked for, in float64, with the adapter's scale folded into B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.adapters import Lora, describe, load_adapter
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.fitting import fit, is_transposed, without_base
from weft.checkpoints.refs import Ref
from weft.checkpoints.updates import Experts, Update
from weft.errors import UsageError, did_you_mean

_SLICE = re.compile(r"(?P<weight>.+)\[(?P<index>\d+)\]")


@dataclass(frozen=True, slots=True)
class Factors:
    """ΔW = B A of one weight, the scale folded into B; float64."""

    b: Tensor
    """[out, r]"""
    a: Tensor
    """[r, in], kernels flattened: in·kh·kw"""
    shape: tuple[int, ...]
    """The weight's shape as the base stores it."""
    transposed: bool = False
    """True where the base stores `[in, out]` (GPT-2's Conv1D, embeddings)."""

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def delta(self) -> Tensor:
        """ΔW in the base's shape. Dense: for tests and small weights only."""
        product = self.b @ self.a
        return (product.T if self.transposed else product).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Slot:
    """What the output holds of one weight, known before anything is computed."""

    rank: int
    dims: tuple[int, ...]
    """`(out, in)`, or `(out, in, kh, kw)` of a convolution."""
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    """The base stores `[in, out]`."""
    embedding: bool = False


def split_slice(name: str) -> tuple[str, int | None]:
    """`"experts.down_proj[3]"` → `("experts.down_proj", 3)`; None for a weight of its own."""
    match = _SLICE.fullmatch(name)
    return (match["weight"], int(match["index"])) if match else (name, None)


class Adapter:
    """An adapter's updates by the base's names, without PEFT's prefix. Reads headers only until asked.

    Given its base, names and shapes are the base's own (a checkpoint may lack a prefix, kohya's names have
    underscores for dots). A stack of experts counts as one weight an expert: `experts.down_proj[3]`.
    """

    def __init__(self, lora: Lora, base: Checkpoint | None = None) -> None:
        self.lora = fit(lora, base) if base is not None else without_base(lora)
        self.base = base
        self.origin = lora.origin
        self.config: Mapping[str, Any] = lora.config
        self._updates: dict[str, tuple[str, Update, int]] = {}
        for name, update in self.lora.modules.items():
            if not isinstance(update, Experts):
                self._updates[name] = (name, update, 0)
            else:
                self._updates |= {f"{name}[{i}]": (name, update, i) for i in range(update.count)}

    @property
    def base_name(self) -> str | None:
        """The model it was trained on, as its config calls it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def names(self) -> tuple[str, ...]:
        """Weights with a low-rank update, in the adapter's order."""
        return tuple(self._updates)

    def update(self, name: str) -> Update:
        """How one weight's update is stored; UsageError with the nearest name if it has none."""
        if name not in self._updates:
            raise UsageError(f"{self.origin} has no update of {name!r}{did_you_mean(name, self.names)}")
        return self._updates[name][1]

    def rank(self, name: str) -> int:
        """r of one weight's update. Reads nothing."""
        return self.update(name).rank(self.lora.weights)

    def shapes(self, name: str) -> tuple[int, ...]:
        """`(out, in)`, or `(out, in, kh, kw)` of a convolution. Reads nothing."""
        dims = self.update(name).dims(self.lora.weights)
        if self.base is None or isinstance(self.update(name), Experts):
            return dims
        # trainers may store a pointwise convolution's factors as a matrix's, or the other way round
        stored = self._stored(name)
        return dims if len(stored) == len(dims) else stored

    def _stored(self, name: str) -> tuple[int, ...]:
        assert self.base is not None
        weight = self._updates[name][0]
        return self.base.info(self.base.aliases.get(weight, weight)).shape

    def transposed(self, name: str) -> bool:
        """True where the base stores the weight as `[in, out]`, as far as can be told."""
        update = self.update(name)
        if self.base is not None:
            weight = self._updates[name][0]
            return is_transposed(self.lora, self.base.info(self.base.aliases.get(weight, weight)), update)
        return _turned(self.lora, update)

    def scale(self, name: str) -> float:
        """alpha / r of one update (alpha / √r for rsLoRA), which `factors` folds into B."""
        return self.update(name).scale

    def is_dora(self, name: str) -> bool:
        """True where the length of each output is learned too (DoRA): then the update depends on the base."""
        return self.update(name).magnitude is not None

    def slot(self, name: str, rank: int | None = None) -> Slot:
        """What an output needs to know of this weight, with its own rank or another."""
        update, info = self.update(name), self.lora.weights.info
        dtype = reduce(torch.promote_types, (info(key).dtype for key in update.keys))
        own = self.rank(name) if rank is None else rank
        return Slot(own, self.shapes(name), dtype, self.transposed(name), update.embedding)

    def factors(self, name: str) -> Factors:
        """Read B and A of one weight in float64, scale folded into B. DoRA's magnitudes are not in them."""
        update, dims, turned = self.update(name), self.shapes(name), self.transposed(name)
        b, a = update.factors(self.lora.weights, self._updates[name][2])
        return Factors(b, a, dims[::-1] if turned else dims, turned)

    @property
    def biases(self) -> Mapping[str, TensorInfo]:
        """Biases (or other tensors) that something is added to (PEFT's lora_bias), by the base's names."""
        return {name: self.lora.weights.info(key) for name, (key, _) in self.lora.biases.items()}

    def bias(self, name: str) -> Tensor:
        """What is added to a bias, scale included; float64."""
        key, scale = self.lora.biases[name]
        return self.lora.weights.tensor(key).to(torch.float64) * scale

    @property
    def replaced(self) -> Mapping[str, TensorInfo]:
        """Tensors that the adapter replaces whole (modules_to_save, trained biases), by the base's names."""
        return {name: self.lora.weights.info(key) for name, key in self.lora.replaced.items()}

    def replacement(self, name: str) -> Tensor:
        """The tensor that takes the base's place, in its stored dtype."""
        return self.lora.weights.tensor(self.lora.replaced[name])

    @property
    def scalings(self) -> Mapping[str, TensorInfo]:
        """Weights that (IA)³ multiplies, and the vector's shape."""
        return {name: self.lora.weights.info(s.key) for name, s in self.lora.scalings.items()}

    def scaling(self, name: str) -> Tensor:
        """(IA)³'s vector of one weight as it is stored; float64. 1 leaves the weight as it is."""
        return self.lora.weights.tensor(self.lora.scalings[name].key).to(torch.float64)

    def __add__(self, other: Adapter) -> Adapter:
        from weft.adapters.arithmetic import plus

        return plus(self, other)

    def __sub__(self, other: Adapter) -> Adapter:
        from weft.adapters.arithmetic import plus

        return plus(self, other, -1.0)

    def __mul__(self, factor: float) -> Adapter:
        from weft.adapters.arithmetic import times

        return times(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> Adapter:
        return self * -1.0

    def __repr__(self) -> str:
        return f"<Adapter {self.origin!r}: {len(self.names)} weights>"


def _turned(lora: Lora, update: Update) -> bool:
    """Whether a weight is stored `[in, out]`, from the adapter alone."""
    if isinstance(update, Experts):
        return update.turned
    return update.embedding or (lora.transposed and len(update.dims(lora.weights)) == 2)


def as_adapter(
    source: Adapter | Lora | Checkpoint | Ref | Path | str, base: Checkpoint | None = None
) -> Adapter:
    """An adapter from a folder, file, reference, adapter checkpoint (`adapter_checkpoint`) or one already read.

    With `base`, its names and shapes are held against the base's: DataProblems where they do not fit.
    """
    if isinstance(source, Adapter):
        return source if base is None or base is source.base else Adapter(source.lora, base)
    if isinstance(source, Lora):
        return Adapter(source, base)
    if isinstance(source, Checkpoint):
        config = getattr(source, "adapter_config", None)
        if config is None:
            raise UsageError(f"{source.origin} is a model, not an adapter; pass the adapter's folder")
        return Adapter(describe(config, source, source.origin), base)
    return Adapter(load_adapter(source), base)


def load_adapters(
    *sources: Adapter | Lora | Checkpoint | Ref | Path | str, base: Checkpoint | None = None
) -> list[Adapter]:
    """`as_adapter` of each, in order."""
    return [as_adapter(source, base) for source in sources]
