"""`placed`: a network of its own that holds a model's values."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from weft.api import Model, materialize
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError


def placed(model: Model, module: nn.Module | None = None) -> tuple[nn.Module, Checkpoint]:
    """A network with a model's values, in evaluation mode and frozen, and the checkpoint that they are of.

    `module` is copied; without it the model is a module (copied, too) or its config names a model of transformers.
    """
    if isinstance(model, nn.Module):
        made, source = copy.deepcopy(model), of_module(model)
    else:
        source = load(model)
        if module is None and source.config is None:
            raise UsageError(f"give the network that {source.origin} is of (module=…)")
        if module is None:
            from weft.llm.hf import to_transformers

            made = to_transformers(source)
        else:
            made = materialize(source, copy.deepcopy(module))
    return made.eval().requires_grad_(False), source


def of_module(model: nn.Module) -> Checkpoint:
    """A module's weights, with the config of a model of transformers."""
    config: Any = getattr(model, "config", None)
    state = StateDict(model)
    return InCompany(state, config.to_dict()) if hasattr(config, "to_dict") else state
