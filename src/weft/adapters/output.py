"""`AdapterCheckpoint`: an adapter computed when it is read, which `weft.save` writes as PEFT loads it.

Ranks and shapes are known at once; A and B of one weight are computed together, once, when either is read.
The scale is folded into the factors and alpha = r, so that no loader scales anything a second time.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from weft.adapters.factors import Factors
from weft.adapters.layout import Held, Slot, kohya_entries, peft_config, peft_entries, vllm_slots
from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import executing, execution, map_here
from weft.checkpoints.limits import shown
from weft.checkpoints.ranges import element_range
from weft.errors import UsageError

__all__ = ["AdapterCheckpoint", "Extra", "Held", "Slot", "adapter_checkpoint"]

_CACHED = 64
"""Weights whose factors are kept between the reads of A and of B (see `layout.interleaved`)."""


@dataclass(frozen=True, slots=True)
class Extra:
    """A tensor that an adapter adds or replaces whole: what it is, and how to read it."""

    info: TensorInfo
    read: Callable[[], Tensor]


class AdapterCheckpoint(Checkpoint):
    """The tensors of an adapter file, computed weight by weight. Made by `adapter_checkpoint`."""

    stem = "adapter_model"

    def __init__(
        self,
        entries: Mapping[str, Held],
        compute: Callable[[str], Factors],
        extras: Mapping[str, Extra],
        config: Mapping[str, Any],
        *,
        origin: str,
        inputs: Sequence[Checkpoint],
        what: str,
        reads: Callable[[str], int] | None,
        working: Callable[[str], int] | None,
        notes: Sequence[str],
        layout: Literal["peft", "kohya"] = "peft",
    ) -> None:
        self.origin = origin
        self.adapter_config, self.format = config, layout
        self.notes = tuple(notes)
        """What the user should know, e.g. the flag to serve it with."""
        self.report: dict[str, Any] = {}
        """Filled by what computes the factors, by weight, as they are computed."""
        self.seed: int | None = None
        """What random choices were drawn from, for the manifest."""
        self._entries, self._extras, self._compute = dict(entries), dict(extras), compute
        self._inputs, self._what = tuple(inputs), what
        self._reads, self._working = reads, working
        self._tensors = {key: held.info for key, held in entries.items()}
        self._tensors |= {key: extra.info for key, extra in extras.items()}
        self._start()

    def _start(self) -> None:
        self._guard = Lock()
        self._locks: dict[str, Lock] = {}
        self._cache: OrderedDict[str, Factors] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_guard", "_locks", "_cache")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self._inputs

    @property
    def assets(self) -> tuple[Asset, ...]:
        text = json.dumps(self.adapter_config, indent=2, ensure_ascii=False) + "\n"
        return (Asset("adapter_config.json", text.encode),)

    def grain(self, name: str) -> int:
        return max(self.info(name).numel, 1)

    def identity(self) -> str | None:
        inner = [s.identity() for s in self._inputs]
        if not inner or None in inner:
            return None
        return f"{self._what}({', '.join(map(str, inner))}){sorted(self.adapter_config.items(), key=str)}"

    def bytes_read(self, name: str) -> int:
        held = self._entries.get(name)
        if held is None or self._reads is None:
            return self.info(name).nbytes if held is None else 0
        return sum(map(self._reads, held.once))

    def working_bytes(self, name: str, count: int) -> int:
        held = self._entries.get(name)
        own = 24 * self.info(name).numel
        if held is None or self._working is None:
            return own
        return own + max(map(self._working, held.weights), default=0)

    def ready(self, name: str) -> None:
        """Nothing: whatever must come before reading an input is done by what computes the factors."""

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        if name in self._extras:
            values = self._extras[name].read()
        elif name in self._entries:
            values = self._entries[name].place(self.factors)
        assert tuple(values.shape) == info.shape, f"{name}: {tuple(values.shape)} is not {info.shape}"
        values = values.reshape(-1)[start:stop]
        return values if dtype is None else round_to(values, dtype)

    def factors(self, weight: str) -> Factors:
        """B and A of one weight, computed once for all who ask at the same time."""
        with self._guard:
            lock = self._locks.setdefault(weight, Lock())
        with lock:
            with self._guard:
                if weight in self._cache:
                    self._cache.move_to_end(weight)
                    return self._cache[weight]
            # alone: a thread that helped another here, holding this lock, could come to wait for that other's
            with executing(replace(execution(), map=map_here)):
                made = self._compute(weight)
            with self._guard:
                self._cache[weight] = made
                while len(self._cache) > _CACHED:
                    old, _ = self._cache.popitem(last=False)
                    self._locks.pop(old, None)
            return made

    def _affine(self, *_: object) -> Any:
        raise UsageError(
            "factors of adapters cannot be added one by one, since B₁A₁ + B₂A₂ is not (B₁+B₂)(A₁+A₂): use "
            "weft.merge_adapters, or load them over their base first"
        )

    __add__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _affine


def adapter_checkpoint(
    slots: Mapping[str, Slot],
    compute: Callable[[str], Factors],
    *,
    origin: str,
    inputs: Iterable[Checkpoint] = (),
    what: str = "",
    base_name: str | None = None,
    replaced: Mapping[str, Extra] | None = None,
    biases: Mapping[str, Extra] | None = None,
    reads: Callable[[str], int] | None = None,
    working: Callable[[str], int] | None = None,
    layout: Literal["peft", "kohya"] = "peft",
    serve: Literal["vllm"] | None = None,
    notes: Sequence[str] = (),
) -> AdapterCheckpoint:
    """A lazy adapter: `slots` says the rank and shape of each weight's update, `compute(weight)` makes it.

    `compute` gives `Factors` of at most the slot's rank (fewer are padded with zeros) and may be called from
    several threads. Slots of one expert stack are named `weight[0]`, `weight[1]` … `replaced` are tensors that
    take the base's place, `biases` are added to the base's. `what` names the computation and all its settings
    and `inputs` what it reads, so that an interrupted save can go on; `reads` and `working` are the bytes read
    and held for one weight. `layout="kohya"` names tensors `lora_down`/`lora_up` (save it as one file).
    `serve="vllm"` rounds the rank up to one that vLLM takes; DataProblems lists what vLLM would refuse.
    """
    replaced, biases = replaced or {}, biases or {}
    if not slots and not replaced and not biases:
        raise UsageError(f"{origin}: there is nothing to write: no weight has an update")
    told = list(notes)
    _check_names(slots, layout, origin)
    if serve == "vllm":
        slots, flag = vllm_slots(slots, [*replaced, *biases], origin)
        told.append(flag)
    if layout == "kohya":
        entries = kohya_entries(slots, [*replaced, *biases], origin)
        extras = {
            f"{weight.removesuffix('.weight')}.alpha": Extra(
                TensorInfo((), torch.float32), _Constant(float(slot.rank))
            )
            for weight, slot in slots.items()
        }
    else:
        entries = peft_entries(slots)
        extras = {f"base_model.model.{_wrapped(name, slots)}": extra for name, extra in replaced.items()}
        extras |= _lora_biases(slots, biases)
    own = [name for name in replaced if _wrapped(name, slots) != name]
    config = peft_config(slots, [n for n in replaced if n not in own], bool(biases), base_name)
    if own:
        config["bias"] = "lora_only"
    return AdapterCheckpoint(
        entries, compute, extras, config, origin=origin, inputs=tuple(inputs), what=what, reads=reads,
        working=working, notes=told, layout=layout,
    )  # fmt: skip


def _check_names(slots: Mapping[str, Slot], layout: str, origin: str) -> None:
    named = [n for n in slots if re.match(r"(lora|lycoris)_[^.]+\.weight$", n)]
    if layout == "peft" and named:
        raise UsageError(
            f"{origin}: names such as {shown(named[0])} have underscores for dots, which only the base can undo: "
            'give the base, or write it as it is with layout="kohya"'
        )


def _wrapped(name: str, slots: Mapping[str, Slot]) -> str:
    """PEFT moves the bias of a module that it updates into the module inside its wrapper."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}" if leaf == "bias" and f"{module}.weight" in slots else name


@dataclass(frozen=True, slots=True)
class _Constant:
    """A tensor of one repeated value. A class, so that it pickles."""

    value: float
    shape: tuple[int, ...] = ()

    def __call__(self) -> Tensor:
        return torch.full(self.shape, self.value, dtype=torch.float64)


def _lora_biases(slots: Mapping[str, Slot], biases: Mapping[str, Extra]) -> dict[str, Extra]:
    """PEFT's `lora_B.bias`: with lora_bias every module has one, so that the others get zeros."""
    if not biases:
        return {}
    homes = {weight.removesuffix(".weight"): slot for weight, slot in slots.items()}
    strange = [name for name in biases if name.removesuffix(".bias") not in homes]
    if strange:
        raise UsageError(f"biases without a low-rank update beside them cannot be written: {strange}")
    made = {}
    for module, slot in homes.items():
        shape = slot.dims[:1]
        zeros = Extra(TensorInfo(shape, slot.dtype), _Constant(0.0, shape))
        made[f"base_model.model.{module}.lora_B.bias"] = biases.get(f"{module}.bias", zeros)
    return made
