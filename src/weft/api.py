"""The verbs: `load`, `merge`, `save`, `materialize`. Anything that holds weights may be given to each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.lazy import Cast
from weft.checkpoints.load import load
from weft.engine.save import Saved
from weft.engine.save import save as _save
from weft.errors import DataProblems, UsageError
from weft.late import Tensor, torch
from weft.methods.merge import Merge, Mismatch, Missing
from weft.methods.registry import METHODS, Method
from weft.methods.step import At
from weft.recipes.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

    Model = Checkpoint | str | Path | nn.Module | Mapping[str, Tensor]
else:
    Model = Any  # to say it here would take torch

__all__ = ["load", "materialize", "merge", "save"]


def merge(
    models: Sequence[Model],
    method: str | Method = "linear",
    *,
    base: Model | None = None,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    missing: Missing = "error",
    mismatch: Mismatch = "error",
    nonfinite: Literal["error", "allow"] = "error",
    compat: Literal["mergekit"] | None = None,
    statistics: Sequence[Model] | None = None,
    base_statistics: Model | None = None,
    **params: Any,
) -> Checkpoint:
    """A lazy checkpoint: `models` merged by a method (see `weft methods`), computed when it is read.

    Models and base: paths, Hub ids, URLs, modules, state dicts or checkpoints, merges included. `params` are
    the method's; a value may be a number, one number a model (for parameters like `weight`), a curve over
    the blocks, or a list of rules, as in a recipe. `dtype` is what to store the result in (the base's, or
    first model's, by default), torch's or by name; `compat="mergekit"` takes MergeKit's defaults and choices.
    Methods that need statistics of the models (`weft.measure`) take one checkpoint of them a model, in order.

    Raises UsageError for what cannot be meant and DataError where the tensors don't fit together.
    """
    if isinstance(models, str | Path | Mapping | Checkpoint) or hasattr(models, "named_parameters"):
        raise UsageError("models must be a list, even for one model")
    made = method if isinstance(method, Method) else METHODS[method]
    sources = [load(m) for m in models]
    anchor = None if base is None else load(base)
    defaults = made.compat.get(compat, {}) if compat else {}
    node = Merge(
        sources, base=anchor, method=made, params=_resolver(made, {**defaults, **params}, len(sources)),
        seed=seed, missing=missing, mismatch=mismatch, nonfinite=nonfinite,
        statistics=None if statistics is None else [load(s) for s in statistics],
        base_statistics=None if base_statistics is None else load(base_statistics),
    )  # fmt: skip
    return node if dtype is None else Cast(node, dtype)


class _resolver:
    """Parameters by tensor: constants as they are, curves and rules resolved. A class, so that it pickles."""

    def __init__(self, method: Method, params: Mapping[str, Any], k: int) -> None:
        self.fixed: dict[str, Any] = {}
        self.varying: dict[str, Schedule] = {}
        for name, value in params.items():
            declared = method.params.get(name)
            per_model = declared is not None and declared.per_model
            if declared is None or not isinstance(value, list | tuple) or (
                per_model and len(value) == k and not any(isinstance(v, Mapping) for v in value)
            ):  # fmt: skip
                self.fixed[name] = value
            else:
                self.varying[name] = Schedule.parse(list(value), declared)
        self.fixed = {
            n: v for n, v in method.check(self.fixed | self._sample()).items() if n not in self.varying
        }
        method.pipeline(**self.fixed, **self._sample())

    def _sample(self) -> dict[str, Any]:
        return {n: s.at(At("layers.0.weight", layer=0)) for n, s in self.varying.items()}

    def __call__(self, at: At) -> dict[str, Any]:
        return self.fixed | {n: s.at(at) for n, s in self.varying.items()}


def save(model: Model, out: str | Path, **settings: Any) -> Saved:
    """Write a checkpoint (or anything `load` takes) as safetensors; see `weft.engine.save.save`."""
    return _save(load(model), out, **settings)


def materialize(checkpoint: Model, module: nn.Module) -> nn.Module:
    """Copy a checkpoint's values into a module, in place; every name and shape must agree.

    Names that the module ties or the checkpoint ties need be there only once. Returns the module.
    """
    source = load(checkpoint)
    state = module.state_dict()
    wanted = {n: source.aliases.get(n, n) for n in state}
    shared = {t.data_ptr() for n, t in state.items() if wanted[n] in source and t.numel()}
    problems = [
        f"{n}: not in {source.origin}"
        for n, t in state.items()
        if wanted[n] not in source and t.data_ptr() not in shared
    ]
    problems += [f"{n}: not in the module" for n in source if n not in state]
    problems += [
        f"{n}: shape {list(source.info(wanted[n]).shape)} does not fit {list(t.shape)}"
        for n, t in state.items()
        if wanted[n] in source and source.info(wanted[n]).shape != tuple(t.shape)
    ]
    if problems:
        raise DataProblems(f"{source.origin} does not fit the module", problems)
    source.survey()
    with torch.no_grad():
        for name, target in state.items():
            if wanted[name] in source:
                values = source.tensor(wanted[name])
                target.copy_(round_to(values, target.dtype) if values.is_floating_point() else values)
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
    if any(t.numel() and t.data_ptr() not in own for t in state.values()):
        module.load_state_dict(state)  # its state dict is computed (`Charted`): what was filled is a copy
    return module
