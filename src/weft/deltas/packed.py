"""`Packed`: the stored parts of a delta, computed from model and base when read; `weft.save` writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.company import asset
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import executing, execution, map_here
from weft.checkpoints.ranges import element_range
from weft.deltas.format import DELTA_FILE, Document
from weft.deltas.scheme import Encoder
from weft.deltas.ways import Way
from weft.errors import UsageError


class Packed(Checkpoint):
    """The parts `<tensor>.<part>` of every stored tensor, with `weft_delta.json` beside them."""

    stem = "delta"

    def __init__(
        self,
        model: Checkpoint,
        base: Checkpoint,
        encoders: Mapping[str, Encoder],
        document: Document,
        way: Way,
        assets: Callable[[], tuple[Asset, ...]] = tuple,
    ) -> None:
        self.model, self.base, self.document, self.way = model, base, document, way
        self.origin = f"delta of {model.origin} from {base.origin}"
        self._encoders, self._assets = dict(encoders), assets
        self._homes: dict[str, tuple[str, str]] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for name, encoder in encoders.items():
            for part, info in encoder.scheme.parts(encoder.pair.info).items():
                self._tensors[f"{name}.{part}"] = info
                self._homes[f"{name}.{part}"] = name, part
        self._start()

    def _start(self) -> None:
        self._guard = Lock()
        self._locks: dict[str, Lock] = {name: Lock() for name in self._encoders}
        self._prepared: set[str] = set()
        self._waiting: dict[str, set[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_guard", "_locks", "_prepared", "_waiting")
        return {k: v for k, v in self.__dict__.items() if k not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.model, self.base)

    @property
    def assets(self) -> tuple[Asset, ...]:
        """`weft_delta.json`, and the model's files that the base lacks or has otherwise."""
        return (asset(DELTA_FILE, self.document.to_json()), *self._assets())

    def identity(self) -> str | None:
        # two ways may have one document: a sketch and the exact factors of one rank must not meet in a file
        inner = super().identity()
        return inner and f"{self.way}{self.document.to_json().decode()}{inner}"

    def ready(self, name: str) -> None:
        """The first pass of a tensor, once for all its parts."""
        home, _ = self._home(name)
        encoder = self._encoders[home]
        with self._locks[home]:
            if home in self._prepared:
                return
            # alone: a thread that helped another here, holding this lock, could come to wait for that other's
            with executing(replace(execution(), map=map_here, where="cpu")):
                self._inputs_ready(encoder)
                encoder.prepare()
                self._inputs_ready(encoder)  # a decomposition lets go of what it read
            self._prepared.add(home)

    def _inputs_ready(self, encoder: Encoder) -> None:
        pair = encoder.pair
        pair.model.ready(pair.name)
        if pair.theirs in pair.base:
            pair.base.ready(pair.theirs)

    def release(self, name: str) -> None:
        """Forget what was found out for a tensor, with the last of its parts."""
        home, part = self._home(name)
        encoder = self._encoders[home]
        every = encoder.scheme.parts(encoder.pair.info)
        with self._guard:
            waiting = self._waiting.setdefault(home, set(every))
            waiting.discard(part)
            if waiting:
                return
            del self._waiting[home]  # for the next save
        with self._locks[home]:
            self._prepared.discard(home)
            encoder.forget()
        encoder.pair.model.release(encoder.pair.name)
        if encoder.pair.theirs in encoder.pair.base:
            encoder.pair.base.release(encoder.pair.theirs)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        self.ready(name)
        home, part = self._home(name)
        values = torch.empty(0, dtype=info.dtype) if start == stop else self._encode(home, part, start, stop)
        return values if dtype is None or dtype == info.dtype else round_to(values, dtype)

    def _encode(self, home: str, part: str, start: int, stop: int) -> Tensor:
        values = self._encoders[home].encode(part, start, stop)
        assert len(values) == stop - start, f"{home}.{part}: {len(values)} of {stop - start}"
        return values

    def _home(self, name: str) -> tuple[str, str]:
        self.info(name)
        return self._homes[name]

    def grain(self, name: str) -> int:
        home, part = self._home(name)
        return self._encoders[home].grain(part)

    def bytes_read(self, name: str) -> int:
        return self._encoders[self._home(name)[0]].bytes_read()

    def working_bytes(self, name: str, count: int) -> int:
        home, part = self._home(name)
        return self._encoders[home].working_bytes(part, count)

    def held_bytes(self, name: str) -> int:
        return 0

    def hold(self, name: str) -> None:
        """Nothing is held: every part is read in one pass, but for the first pass of `ready`."""

    def _affine(self, *_: object) -> Any:
        raise UsageError(
            "the parts of a delta are no weights and cannot be added: save it and load it, or add the models"
        )

    __add__ = __sub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _affine
