"""`weft.align`: a model with its units in the order of another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from weft.align.discovery import Inputs, discover
from weft.align.spec import PermutationSpec
from weft.align.stored import as_specified, spec_of
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError, did_you_mean

MATCHERS = {
    "weights": "weft.align.weights:weight_matching",
    "ste": "weft.align.straight:straight_through",
    "sinkhorn": "weft.align.sinkhorn:sinkhorn_matching",
    "annealing": "weft.align.annealing:annealed",
    "deep": "weft.align.deep:deep_matching",
    "rotations": "weft.align.turning:rotation_matching",
}
"""Ways to match: functions `(spec, a, b, **options)` that give permutations of b, or a checkpoint that fits a."""
RUNNERS = {
    "activations": "weft.align.correlate:activation_matching",
    "correlation": "weft.align.correlate:neuron_alignment",
    "cca": "weft.align.cca:cca_merge",
    "mudsc": "weft.align.mudsc:mudsc",
    "ot": "weft.align.transport:ot_fusion",
    "transformers": "weft.align.transport:transformer_fusion",
}
"""Ways that run the networks: functions `(b, a, data, module=, spec=, **options)` that give an `Alignment`."""

Matcher = Callable[..., Any]


def align(
    b: Any, to: Any, how: str | Matcher = "weights", *, module: nn.Module | None = None,
    spec: PermutationSpec | str | Path | None = None, example_inputs: Inputs = None, data: Any = None,
    **options: Any,
) -> Checkpoint:  # fmt: skip
    """`b` with its units in the order in which it fits `to`: a lazy checkpoint that computes what b computes.

    `b`, `to`: anything `weft.load` takes. `how`: weights, ste, sinkhorn, annealing, deep (with `network`, a trained
    aligner or its file), rotations (and scales, with permutations), activations, correlation, mudsc, cca, ot,
    transformers (the last three also mix units, which changes what b computes), or a function of
    `(spec, a, b, **options)`, such as a trained aligner;
    `options` are the matcher's. `data` are for those that need them: (inputs, targets)
    or batches for ste, annealing and sinkhorn, inputs for those after them. The symmetries are those of `spec`
    (or a file of one), else of `module`, else of `to` itself, if it is a module or has the config of a
    transformers model; `example_inputs` are for running that once.

    Raises UsageError where there is no telling what the network is, DataError where it cannot be run,
    DataProblems where the models do not fit the specification or each other.
    """
    matcher = _matcher(how)
    if isinstance(spec, str | Path):
        spec = PermutationSpec.load(spec)
    if how in RUNNERS:
        return _run(matcher, str(how), b, to, data, module, spec, options)
    target, source = load(to), load(b)
    module = module if module is not None else next((m for m in (to, b) if isinstance(m, nn.Module)), None)
    if spec is None:
        spec = spec_of(target, example_inputs) if module is None else discover(module, example_inputs)
    known = signature(matcher).parameters
    if "net" in known and "net" not in options:
        options |= _net(how, module, data)
    elif data is not None and "data" in known:
        options["data"] = data
    elif data is not None:
        raise UsageError(f"how={how!r} goes by the weights alone: leave data= away, or choose another way")
    running = {"module": module, "example_inputs": example_inputs}
    options |= {k: v for k, v in running.items() if k in known}
    wrong = [
        o for o in options if o not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values())
    ]
    if wrong:
        raise UsageError(
            f"how={how!r} has no option {wrong[0]!r}{did_you_mean(wrong[0], known)}; it has "
            f"{', '.join(n for n, p in known.items() if p.kind is p.KEYWORD_ONLY)}"
        )
    lacking = [
        n for n, p in known.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty and n not in options
    ]
    if lacking:
        raise UsageError(f"how={how!r} needs {' and '.join(f'{n}=' for n in lacking)}")
    fitted = as_specified(source, spec)
    found = matcher(spec, as_specified(target, spec), fitted, **options)
    if not isinstance(found, Mapping):
        return found  # type: ignore[no-any-return]
    moved = spec.apply(fitted, found)
    if fitted is source:
        return moved
    from weft.llm.experts import experts_like

    return experts_like(moved, source)


def _net(how: str | Matcher, module: nn.Module | None, data: Any) -> dict[str, Any]:
    """The network with its data, for matchers that are learned from a loss."""
    if data is None and how == "sinkhorn":
        return {}
    if module is None or data is None:
        raise UsageError(
            f"how={how!r} goes by the loss: give module= and data=, (inputs, targets) or batches"
        )
    from weft.analysis.network import Network

    return {"net": Network(module, data)}


def _run(
    matcher: Matcher, how: str, b: Any, to: Any, data: Any, module: nn.Module | None,
    spec: PermutationSpec | None, options: dict[str, Any],
) -> Checkpoint:  # fmt: skip
    if data is None and (how != "ot" or options.get("by") == "activations"):
        raise UsageError(f"how={how!r} compares what units do: give data=, some inputs of the network")
    if module is None and not all(isinstance(m, nn.Module) for m in (b, to)):
        from weft.llm.hf import to_transformers

        target = load(to)
        if target.config is None:
            raise UsageError(f"how={how!r} runs the network: give module=, the network of {target.origin}")
        module = to_transformers(target)
    found = matcher(b, to, data, module=module, spec=spec, **options)
    return found.checkpoint  # type: ignore[no-any-return]


def _matcher(how: str | Matcher) -> Matcher:
    if callable(how):
        return how
    known = MATCHERS | RUNNERS
    if how not in known:
        raise UsageError(
            f"there is no way to align called {how!r}{did_you_mean(how, known)}; there are {', '.join(known)}"
        )
    where, _, name = known[how].partition(":")
    return getattr(import_module(where), name)  # type: ignore[no-any-return]
