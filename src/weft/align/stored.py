"""Checkpoints of transformers whose files have other names than the module, or experts one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weft.align.discovery import Inputs, discover
from weft.align.spec import PermutationSpec
from weft.align.terms import size_of
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.errors import UsageError


def spec_of(model: Any, example_inputs: Inputs = None) -> PermutationSpec:
    """The symmetries of a checkpoint of transformers, from its config alone: no weight is read.

    Tensors have the names of the checkpoint. Experts that it stores one by one are those of one tensor here, as
    transformers has them in memory, since they change places; `weft.align` shows and writes such checkpoints so.

    Raises UsageError without a config, or for a model_type that transformers does not have.
    """
    from weft.checkpoints.load import load
    from weft.llm.hf import config_of, model_class, quiet

    checkpoint = load(model)
    if checkpoint.config is None:
        raise UsageError(
            f"{checkpoint.origin} has no config that says which network it is: give module= or spec="
        )
    with quiet():
        with torch.device("meta"):
            module = model_class(checkpoint)(config_of(checkpoint))
        spec = discover(module, example_inputs)
        names = _names(module)
    shown = as_specified(checkpoint, spec)
    held = {*shown, *shown.aliases}
    told = {n: names[n] for n in spec.axes if n not in held and names.get(n) in held}
    return replace(
        spec,
        axes={told.get(n, n): row for n, row in spec.axes.items()},
        ties={told.get(n, n): told.get(t, t) for n, t in spec.ties.items()},
    )


def _names(module: Any) -> dict[str, str]:
    """Name in memory → name in files, as transformers writes them."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before the names could differ
        return {}
    state = dict(module.state_dict())
    called = {id(t): n for n, t in state.items()}
    found: Mapping[str, Tensor] = revert_weight_conversion(module, dict(state))
    return {called[id(t)]: n for n, t in found.items() if id(t) in called}


def as_specified(model: Checkpoint, spec: PermutationSpec) -> Checkpoint:
    """A mixture with its experts in one tensor, where the specification has them so; anything else as it is."""
    if model.config is None or all(n in model or n in model.aliases or n in spec.ties for n in spec.axes):
        return model
    from weft.llm.experts import experts_like

    return experts_like(model, Specified(spec, model))


class Specified(Checkpoint):
    """Names and shapes of a specification; there are no values."""

    def __init__(self, spec: PermutationSpec, model: Checkpoint) -> None:
        self.origin = "the specification"
        self._config = model.config
        sizes = {n: g.size for n, g in spec.groups.items()}
        shapes = {n: [size_of(t, sizes) for t in row] for n, row in spec.axes.items()}
        self._tensors = {
            n: TensorInfo(tuple(s or 0 for s in shape), torch.float32)
            for n, shape in shapes.items()
            if n not in spec.ties
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._config

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        raise UsageError("a specification has no values")
