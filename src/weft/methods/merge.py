"""`Merge`: a method applied to checkpoints, itself a lazy checkpoint.

For every output tensor the node knows, from names and shapes alone, which inputs take part and which
parameters hold. Values are computed for the range that is asked for: read the inputs' range, subtract the
base where the method works on task vectors, run the steps in float64, add the base, round once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DType
from weft.checkpoints.execution import execution
from weft.errors import DataError, UsageError
from weft.late import Tensor, torch
from weft.methods import by_torch
from weft.methods.gather import gather
from weft.methods.held import Held
from weft.methods.layers import block_of, count_layers
from weft.methods.measured import Measured
from weft.methods.parts import Part, parts_of, stored_name
from weft.methods.registry import Method
from weft.methods.step import At, Bound, Pipeline, Shapes, row_length

Missing = Literal["error", "carry", "available"]
Mismatch = Literal["error", "carry"]
Params = Callable[[At], Mapping[str, Any]]
Found = dict[str, Any]


def _same(params: Mapping[str, Any], at: At) -> Mapping[str, Any]:
    """The same parameters for every tensor."""
    return params


class Merge(Checkpoint):
    """One method over `models` (and a base). See the module's docstring.

    `params(at)` gives the method's parameters for the tensor at hand. `missing` and `mismatch` say what to
    do with tensors that not all inputs have, or have in different shapes; by default an error lists all of
    them. A NaN or infinity in an input is an error that names it, unless `nonfinite="allow"`. `statistics` (one
    checkpoint a model, in order) and `base_statistics` are for methods that need what was measured on data.
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        *,
        base: Checkpoint | None = None,
        method: Method,
        params: Params | Mapping[str, Any] | None = None,
        seed: int = 0,
        missing: Missing = "error",
        mismatch: Mismatch = "error",
        nonfinite: Literal["error", "allow"] = "error",
        origin: str = "",
        statistics: Sequence[Checkpoint] | None = None,
        base_statistics: Checkpoint | None = None,
    ) -> None:
        if not models:
            raise UsageError(f"{method.name} needs at least one model")
        if method.base == "required" and base is None:
            raise UsageError(f"{method.name} works on task vectors and needs a base")
        if method.base == "forbidden" and base is not None:
            raise UsageError(f"{method.name} works on weights and takes no base; list it among the models")
        method.check_arity(len(models))
        self.models, self.base, self.method, self.seed = tuple(models), base, method, seed
        self.missing, self.mismatch, self.nonfinite = missing, mismatch, nonfinite
        self.origin = origin or f"{method.name}({', '.join(m.origin for m in models)})"
        if callable(params):
            self._params: Params = params
        else:
            fixed = method.check(params or {})
            method.pipeline(**fixed)  # says at once what no tensor could accept
            self._params = partial(_same, fixed)  # which pickles
        self._parts = parts_of(self)
        self._tensors = {n: p.info for n, p in self._parts.items()}
        self._layers = count_layers(self._parts)
        self._pipelines: dict[str, Pipeline] = {}
        self._declared: dict[str, Pipeline] = {}
        self._turned: dict[str, bool] = {}
        self._found: dict[tuple[str, int], Found] = {}
        self._held: dict[str, Held] = {}
        self._remembered: dict[str, dict[Any, Any]] = {}
        self._lock = threading.RLock()
        self.measured: Measured | None = None
        self.measured = Measured.of(self, statistics, base_statistics)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_locks", "_remembered")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._remembered = {}

    # -- what is known at once --------------------------------------------------------------------

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def anchor(self) -> Checkpoint:
        """The input whose config, assets and dtypes the result takes: the base, else the first model."""
        return self.inputs[0]

    @property
    def aliases(self) -> Mapping[str, str]:
        shared = dict(self.anchor.aliases)
        return {a: t for a, t in shared.items() if t in self._parts and a not in self._parts}

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.anchor.config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self.anchor.assets

    def part(self, name: str) -> Part:
        self.info(name)
        return self._parts[name]

    def at(self, name: str) -> At:
        """The place of a tensor: shape, seed, block."""
        block = block_of(name)
        layers = self._layers[block[0]] if block else max(self._layers.values(), default=1)
        shape, layer = self._parts[name].info.shape, block[1] if block else None
        turned = self.inputs_first(name)
        return At(name, shape, 0, self.seed, layer, layers, turned)

    def inputs_first(self, name: str) -> bool:
        """As statistics of the weight have it, else as the inputs say."""
        if self.measured is not None and self.measured.knows(name):
            return self.measured.transposed(name)
        if name not in self._turned:
            self._turned[name] = super().inputs_first(name)
        return self._turned[name]

    def pipeline(self, name: str) -> Pipeline:
        """The steps that make one tensor, parameters resolved, in their simplest form for it."""
        if name not in self._pipelines:
            at, steps = self.at(name), self.declared(name).steps
            self._pipelines[name] = Pipeline(tuple(b.simplest(at, self.known(name, b)) for b in steps))
        return self._pipelines[name]

    def known(self, name: str, bound: Bound) -> Shapes:
        """The shapes of what was measured of a tensor for a step."""
        return {} if self.measured is None else self.measured.shapes(self, name, bound.step.needs)

    def declared(self, name: str) -> Pipeline:
        """The method's own steps for one tensor, whatever was measured of it."""
        if name not in self._declared:
            params = dict(self._params(self.at(name)))
            sources = self._parts[name].sources
            if len(sources) < len(self.models):  # a list of weights is a list over the models that take part
                for key, value in params.items():
                    if isinstance(value, list | tuple) and len(value) == len(self.models):
                        params[key] = [value[i] for i in sources]
            self._declared[name] = self.method.pipeline(**params)
        return self._declared[name]

    def grain(self, name: str) -> int:
        part = self.part(name)
        if part.carried_from is not None:
            return part.carried_from.grain(stored_name(part.carried_from, name))
        from math import lcm

        own = self.pipeline(name).grain
        numel, shape = max(1, part.info.numel), part.info.shape
        mine = {"element": 1, "row": row_length(shape), "tensor": numel}[own]
        return min(lcm(mine, *(s.grain(stored_name(s, name)) for s in self._sources(name))), numel)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        carried = self.part(name).carried_from
        for source in (carried,) if carried is not None else self._sources(name):
            source.prefetch(stored_name(source, name), start, stop)

    def bytes_read(self, name: str) -> int:
        part = self.part(name)
        if part.carried_from is not None:
            return part.carried_from.bytes_read(stored_name(part.carried_from, name))
        passes = 1 + sum(b.step.stat.rounds() for b in self.pipeline(name).steps if b.step.stat)
        read = passes * sum(s.bytes_read(stored_name(s, name)) for s in self._sources(name))
        return read + (0 if self.measured is None else self.measured.bytes_read(self, name))

    def held_bytes(self, name: str) -> int:
        part = self.part(name)
        if part.carried_from is not None:
            return 0
        inner = sum(s.held_bytes(stored_name(s, name)) for s in self._sources(name))
        passes = any(b.step.stat and b.scope == "tensor" for b in self.pipeline(name).steps)
        return inner + passes * sum(
            part.info.numel * (8 if s.inputs else s.info(stored_name(s, name)).kind.itemsize)
            for s in self._sources(name)
            if not s.at_hand(stored_name(s, name))
        )

    def hold(self, name: str) -> None:
        part = self.part(name)
        if part.carried_from is not None:
            return
        super().hold(name)
        if any(b.step.stat and b.scope == "tensor" for b in self.pipeline(name).steps):
            self._held[name] = Held(self.readers(name), name, part.info.numel, self.grain(name))

    def holds(self, name: str) -> bool:
        """Whether `hold` keeps all of the tensor's inputs in memory."""
        return name in self._held and self._held[name].whole

    def remembered(self, name: str) -> dict[Any, Any]:
        """What whoever carries a merge out keeps of a tensor between its ranges, until `release`."""
        return self._remembered.setdefault(name, {})

    def release(self, name: str) -> None:
        self._held.pop(name, None)
        self._remembered.pop(name, None)
        for j in range(len(self.pipeline(name).steps) if self.part(name).carried_from is None else 0):
            self._found.pop((name, j), None)
        super().release(name)

    def working_bytes(self, name: str, count: int) -> int:
        part = self.part(name)
        if part.carried_from is not None:
            return part.carried_from.working_bytes(stored_name(part.carried_from, name), count)
        sources = self._sources(name)
        inner = sum(s.working_bytes(stored_name(s, name), count) for s in sources)
        k = len(part.sources)
        made = self.pipeline(name).workspace(self.at(name), k, partial(self.known, name), count)
        measured = 0 if self.measured is None else self.measured.working_bytes(self, name, count)
        return inner + count * 8 * (k + 1) + made + measured

    def identity(self) -> str | None:
        inner, measured = super().identity(), "" if self.measured is None else self.measured.identity()
        steps = {n: str(self.pipeline(n)) for n in self.merged_names()}
        policy = (self.method.name, self.seed, self.missing, self.mismatch, self.nonfinite)
        return None if inner is None or measured is None else f"{policy}{steps}{inner}{measured}"

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return super().files if self.measured is None else super().files + self.measured.files

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of this merge: which tensors are merged without what was not measured."""
        lacking = {} if self.measured is None else self.measured.unmeasured(self)
        whys = dict.fromkeys(lacking.values())
        return tuple(
            f"{self.method.name}: {why} of {', '.join(n for n, w in lacking.items() if w == why)}"
            for why in whys
        )

    @property
    def carried(self) -> dict[str, str]:
        """Tensors that are copied rather than merged, with the reason."""
        return {n: p.reason for n, p in self._parts.items() if p.carried_from is not None}

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        part = self.part(name)
        if part.carried_from is not None:
            return part.carried_from.read(stored_name(part.carried_from, name), start, stop, dtype=dtype)
        stop = part.info.numel if stop is None else stop
        self.ready(name)
        fused = self._fused(name, start, stop, None if dtype is None else DType.of(dtype))
        if fused is not None:
            return fused.tensor()
        return by_torch.merged(self, name, start, stop, dtype)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        part = self.part(name)
        if part.carried_from is not None:
            return part.carried_from.bits(stored_name(part.carried_from, name), start, stop, dtype=dtype)
        self.ready(name)
        fused = self._fused(name, start, part.info.numel if stop is None else stop, dtype)
        return super().bits(name, start, stop, dtype=dtype) if fused is None else fused

    def _fused(self, name: str, start: int, stop: int, dtype: DType | None) -> Bits | None:
        """The range by kernels, where there are any for these steps."""
        kernels = execution().kernels
        made: Bits | None = None if kernels is None else kernels.merge(self, name, start, stop, dtype)
        return made

    def values(self, name: str, start: int, stop: int) -> tuple[list[Bits], Bits | None]:
        """The range of every model that takes part, and of the base, as they are stored."""
        held, readers = self._held.get(name), self.readers(name)
        there = held.values(start, stop) if held is not None and stop > start else [None] * len(readers)
        *models, base = (
            s.bits(stored_name(s, name), start, stop) if v is None and s is not None else v
            for v, s in zip(there, readers, strict=True)
        )
        return [m for m in models if m is not None], base

    def readers(self, name: str) -> list[Checkpoint | None]:
        """What `values` reads from: the models that take part, then the base or None."""
        return [*(self.models[i] for i in self._parts[name].sources), self.base]

    def refuse_nonfinite(self, name: str, source: Checkpoint) -> None:
        raise DataError(
            f"{source.origin}: tensor {name!r} has NaN or infinite values, which would spread through the "
            f"merge: mend that checkpoint, leave it out, or set nonfinite: allow"
        )

    def _sources(self, name: str) -> list[Checkpoint]:
        models = [self.models[i] for i in self._parts[name].sources]
        return models if self.base is None else [self.base, *models]

    def found(self, name: str, j: int) -> Found:
        """The statistics of step j, gathered before."""
        return self._found.get((name, j)) or self._found.get(("*", j), {})

    def merged_names(self) -> list[str]:
        """The tensors that are not carried."""
        return [n for n, p in self._parts.items() if p.carried_from is None]

    def survey(self) -> None:
        """Statistics over the whole model, step after step."""
        super().survey()
        with self._lock:
            if self.measured is not None:
                self.measured.survey(self)
            names = self.merged_names()
            for j, bound in enumerate(self.pipeline(names[0]).steps if names else ()):
                if bound.step.stat is None or bound.scope != "model" or ("*", j) in self._found:
                    continue
                for name in names:
                    other = self.pipeline(name).steps[j]
                    if other.params != bound.params:
                        raise UsageError(
                            f"{self.method.name}: with scope 'model' {bound.step.name} has one set of "
                            f"parameters, but {name!r} resolves to {dict(other.params)} and {names[0]!r} to "
                            f"{dict(bound.params)}"
                        )
                    self._tensor_statistics(name, upto=j)
                self._found[("*", j)] = gather(self, j, bound, names)

    def ready(self, name: str) -> None:
        """Statistics of one tensor."""
        part = self.part(name)
        if part.carried_from is not None:
            return
        pipeline = self.pipeline(name)
        if self.measured is not None:
            with self._lock:
                self.measured.ready(self, name)
        if all(b.step.stat is None or (name, j) in self._found for j, b in enumerate(pipeline.steps)):
            return
        if any(b.step.stat and b.scope == "model" for b in pipeline.steps):
            self.survey()
        super().ready(name)
        with self._lock_of(name):
            self._tensor_statistics(name, upto=len(pipeline.steps))

    def _lock_of(self, name: str) -> threading.RLock:
        with self._lock:
            locks: dict[str, threading.RLock] = self.__dict__.setdefault("_locks", {})
            return locks.setdefault(name, threading.RLock())

    def _tensor_statistics(self, name: str, upto: int) -> None:
        for j, bound in enumerate(self.pipeline(name).steps[:upto]):
            if bound.step.stat is None or bound.scope == "model" or (name, j) in self._found:
                continue
            self._found[(name, j)] = gather(self, j, bound, [name])
