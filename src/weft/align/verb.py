"""`weft.align`: a model with its units in the order of another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.align.discovery import Inputs, discover
from weft.align.spec import PermutationSpec
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError, did_you_mean

MATCHERS = {
    "weights": "weft.align.weights:weight_matching",
    "ste": "weft.align.straight:straight_through",
    "sinkhorn": "weft.align.sinkhorn:sinkhorn_matching",
    "annealing": "weft.align.annealing:annealed",
}
"""Ways to match: functions `(spec, a, b, **options)` that give permutations of b, or a checkpoint that fits a."""

Matcher = Callable[..., Any]


def align(
    b: Any, to: Any, how: str | Matcher = "weights", *, module: nn.Module | None = None,
    spec: PermutationSpec | str | Path | None = None, example_inputs: Inputs = None, **options: Any,
) -> Checkpoint:  # fmt: skip
    """`b` with its units in the order in which it fits `to`: a lazy checkpoint that computes what b computes.

    `b`, `to`: anything `weft.load` takes. `how`: one of `weft.align.verb.MATCHERS` or a function of
    `(spec, a, b, **options)`; `options` are the matcher's. The symmetries are those of `spec` (or a file of one),
    else of `module`, else of `to` itself, if it is a module or has the config of a transformers model;
    `example_inputs` are for running that once.

    Raises UsageError where there is no telling what the network is, DataError where it cannot be run,
    DataProblems where the models do not fit the specification or each other.
    """
    matcher = _matcher(how)
    target, source = load(to), load(b)
    if isinstance(spec, str | Path):
        spec = PermutationSpec.load(spec)
    module = module if module is not None else next((m for m in (to, b) if isinstance(m, nn.Module)), None)
    if spec is None:
        spec = spec_of(target, example_inputs) if module is None else discover(module, example_inputs)
    if module is not None and "module" in signature(matcher).parameters:
        options.setdefault("module", module)
    found = matcher(spec, target, source, **options)
    return spec.apply(source, found) if isinstance(found, Mapping) else found  # type: ignore[no-any-return]


def spec_of(model: Any, example_inputs: Inputs = None) -> PermutationSpec:
    """The symmetries of a checkpoint of transformers, from its config alone: no weight is read.

    Raises UsageError without a config, or for a model_type that transformers does not have.
    """
    from weft.llm.hf import config_of, model_class, quiet

    checkpoint = load(model)
    if checkpoint.config is None:
        raise UsageError(
            f"{checkpoint.origin} has no config that says which network it is: give module= or spec="
        )
    with quiet(), torch.device("meta"):
        module = model_class(checkpoint)(config_of(checkpoint))
    return discover(module, example_inputs)


def _matcher(how: str | Matcher) -> Matcher:
    if callable(how):
        return how
    if how not in MATCHERS:
        raise UsageError(
            f"there is no way to align called {how!r}{did_you_mean(how, MATCHERS)}; there are {', '.join(MATCHERS)}"
        )
    where, _, name = MATCHERS[how].partition(":")
    return getattr(import_module(where), name)  # type: ignore[no-any-return]
