"""`discover`: a network's permutation symmetries, found by running it once.

arXiv:2209.04836 writes them down by hand.

    spec = weft.align.discover(module, torch.randn(2, 3, 32, 32))
    print(spec); Path("spec.json").write_text(spec.text())

Inputs and outputs of the network stay as they are; everything between may be put in another order as far as
nothing in the network tells the difference. See trace.py for how, spec.py for what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from weft.align.apply import reordered
from weft.align.lower import lowered
from weft.align.spec import Permutations, PermutationSpec
from weft.align.trace import Following, Row, Seen, Trace
from weft.errors import DataError, UsageError

Inputs = Any
"""One tensor, a tuple of arguments, or a mapping of keyword arguments."""


def discover(
    module: nn.Module, example_inputs: Inputs = None, *, outputs: Callable[[Any], Any] | None = None
) -> PermutationSpec:
    """Which axes of which tensors of `module` must be permuted together for it to compute the same.

    `example_inputs`: a tensor, a tuple of arguments or a mapping of keyword arguments, of which values matter only
    where the network's course depends on them; without them, what models of transformers take, and random numbers
    for networks that begin with a linear map. `outputs(result)` picks what must stay the
    same: by default the logits, or all there is. The module is run once in evaluation mode; if it is on the meta
    device, nothing is computed.

    Raises UsageError where there are no inputs to be guessed, DataError where the network cannot be run.
    """
    trace = Trace()
    args, kwargs = _call(module, example_inputs)
    names: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    kept = module.state_dict(keep_vars=True)
    names |= {n: t for n, t in kept.items() if isinstance(t, Tensor)}
    state: dict[str, Row] = {}
    for name, tensor in names.items():
        if name in kept:
            known = next((state[n] for n, t in names.items() if t is tensor and n in state), None)
            fresh = tuple(trace.dims.new(s, of_weights=True) for s in tensor.shape)
            state[name] = trace.set(tensor, known if known is not None else fresh)
    for t in pytree.tree_leaves([args, kwargs]):
        if isinstance(t, Tensor):
            trace.set(t, (trace.fixed(s, "an input of the network") for s in t.shape))
    entered: list[str] = []
    with observed(module, trace, entered), plain(module), torch.no_grad(), Following(trace, module):
        try:
            result = module(*args, **kwargs)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            AttributeError,
            NotImplementedError,
        ) as error:
            where = f" (in {entered[-1]})" if entered else ""
            raise DataError(
                f"{type(module).__name__} cannot be run to find its symmetries{where}: {str(error)[:300]}; give "
                "example_inputs that it accepts"
            ) from error
    for t in pytree.tree_leaves((outputs or _logits)(result)):
        if isinstance(t, Tensor):
            trace.fix(trace.row(t), "an output of the network")
    first: dict[int, str] = {}
    ties = {n: first[id(names[n])] for n in state if first.setdefault(id(names[n]), n) != n}
    return lowered(trace, {n: state[n] for n in kept if n in state}, ties)


def preserved(
    module: nn.Module, spec: PermutationSpec, example_inputs: Inputs = None,
    permutations: Permutations | None = None, *, seed: int = 0, outputs: Callable[[Any], Any] | None = None,
) -> float:  # fmt: skip
    """How much the network's outputs change, relative to their largest, under a random permutation from `spec`."""
    args, kwargs = _call(module, example_inputs)
    state = {n: t.detach() for n, t in module.state_dict().items()}
    moved = reordered(state, spec, spec.random(seed) if permutations is None else spec.complete(permutations))
    pick = outputs or _logits
    with plain(module), torch.no_grad():
        before = [t for t in pytree.tree_leaves(pick(module(*args, **kwargs))) if isinstance(t, Tensor)]
        again = torch.func.functional_call(module, moved, args, kwargs, tie_weights=False)
        after = [t for t in pytree.tree_leaves(pick(again)) if isinstance(t, Tensor)]
    worst = 0.0
    for b, a in zip(before, after, strict=True):
        if b.is_floating_point() and b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    return worst


def _logits(result: Any) -> Any:
    """What of a result must stay: logits, where there are any; no caches."""
    if not isinstance(result, Mapping):
        return result
    found = {k: v for k, v in result.items() if k.startswith("logits")}
    return found or {k: v for k, v in result.items() if "cache" not in k and k != "past_key_values"}


def _call(module: nn.Module, given: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = _guessed(module) if given is None else given
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device.type != "meta":
        given = pytree.tree_map_only(Tensor, lambda t: t.to(device), given)
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, tuple | list) else ((given,), {})


def _guessed(module: nn.Module) -> Inputs:
    if hasattr(module, "config") and hasattr(module, "main_input_name"):
        if module.main_input_name == "input_ids":
            given = {"input_ids": torch.arange(2, 10).reshape(2, 4)}
            decoder = bool(getattr(module.config, "is_encoder_decoder", False))
            return given | ({"decoder_input_ids": given["input_ids"]} if decoder else {})
        from weft.llm.forward import sample_inputs

        return sample_inputs(module)
    first = next((m for m in module.modules() if next(m.parameters(recurse=False), None) is not None), None)
    if isinstance(first, nn.Linear):
        made = torch.randn(2, first.in_features, generator=torch.Generator().manual_seed(0))
        return made.to(first.weight.dtype)
    raise UsageError(
        f"give example_inputs for {type(module).__name__}: a tensor, a tuple of arguments or a mapping, "
        "with which it is run once to find its symmetries"
    )


@contextmanager
def observed(module: nn.Module, trace: Trace, entered: list[str]) -> Iterator[None]:
    """Notes the inputs and outputs of modules that have no modules in them; `entered`: those it is in, by name."""

    def enter(name: str, m: nn.Module, args: Any) -> None:
        entered.append(name)

    def leave(m: nn.Module, args: Any, result: Any) -> None:
        entered.pop()

    def note(name: str, m: nn.Module, args: Any, result: Any) -> None:
        for side, values in (("input", args), ("output", result)):
            first = next((v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)), None)
            if first is not None and first.is_floating_point():
                trace.seen.append(Seen(name, side, trace.row(first)))

    hooks = [
        m.register_forward_hook(partial(note, name))
        for name, m in module.named_modules()
        if name and not list(m.children())
    ]
    for name, m in module.named_modules():
        if name:
            hooks += [m.register_forward_pre_hook(partial(enter, name)), m.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without fused kernels or caches; afterwards all as before."""
    modes = {m: m.training for m in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    wanted = {"_experts_implementation": "batched_mm", "use_cache": False}
    before = [(c, k, getattr(c, k)) for c in configs.values() for k in wanted if hasattr(c, k)]
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for c, k, _ in before:
                setattr(c, k, wanted[k])
            module.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for c, k, v in before:
                setattr(c, k, v)
            for m, training in modes.items():
                m.training = training
