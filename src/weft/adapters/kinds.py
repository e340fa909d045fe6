"""What kind of layer each weight of a model belongs to, since adapters store each kind in a way of its own.

A meta-device model tells, where transformers is installed and knows the class; else shapes and names do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.orientation import experts_inputs_first, inputs_first
from weft.errors import WeftError

Kind = Literal["linear", "transposed", "embedding", "convolution", "experts", "transposed experts", "other"]

_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|shared|embed_tokens|embed_positions|tok_embeddings|word_embeddings|\w*_?embeddings?"
    r"|relative_attention_bias)\.weight"
)
_CLASSES: dict[Kind, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "embedding": (nn.Embedding,),
    "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
}


def kinds(base: Checkpoint) -> dict[str, Kind]:
    """Kind of every tensor (and tied name): "other" for what has no low-rank form (norms, biases, buffers)."""
    told = _from_class(base)
    found: dict[str, Kind] = {}
    for name in (*base.tensors, *base.aliases):
        info = base.info(base.aliases.get(name, name))
        guessed = _by_name(name, info.shape, base.config)
        kind = told.get(name, guessed) if guessed != "other" else "other"
        found[name] = kind if is_mergeable(info.dtype) else "other"
    return found


def _by_name(name: str, shape: tuple[int, ...], config: Mapping[str, object] | None) -> Kind:
    if not name.endswith(".weight"):
        return _stack(name, shape, config) if len(shape) == 3 else "other"
    if len(shape) == 2:
        if _EMBEDDING.search(name):
            return "embedding"
        return "transposed" if inputs_first(name, shape, config) else "linear"
    # a kernel over one input channel each (depthwise) has nothing low-rank about it
    return "convolution" if len(shape) > 2 and shape[1] > 1 else "other"


def _stack(name: str, shape: tuple[int, ...], config: Mapping[str, object] | None) -> Kind:
    """Experts, whichever side their inputs are on."""
    turned = experts_inputs_first(name, shape, config)
    return "other" if turned is None else "transposed experts" if turned else "experts"


def _from_class(base: Checkpoint) -> dict[str, Kind]:
    """Kinds by the module's class, under the base's names. Empty where there is no such model."""
    if not (base.config or {}).get("model_type"):
        return {}
    try:
        from weft.llm.hf import config_of, model_class

        config, made = config_of(base), model_class(base)
        with torch.device("meta"):
            model = made(config)
    except (WeftError, ImportError):
        return {}
    except Exception:  # a config may lead any code of the class astray; names tell well enough
        return {}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Kind] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            for known in (name, name.removeprefix(prefix), prefix + name):
                if known in base or known in base.aliases:
                    found.setdefault(known, _of_module(module, leaf, parameter.dim()))
    return found


def _of_module(module: nn.Module, leaf: str, axes: int) -> Kind:
    """The kind of a module's parameter; "other" for modules that adapters have no layer for (routers, norms)."""
    if axes == 3 and "Experts" in type(module).__name__:
        return "transposed experts" if getattr(module, "is_transposed", False) else "experts"
    if leaf != "weight":
        return "other"
    if type(module).__name__ == "Conv1D":
        return "transposed"
    for kind, classes in _CLASSES.items():
        if isinstance(module, classes):
            return kind
    return "other"
