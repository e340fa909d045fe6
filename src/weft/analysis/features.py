"""What every layer of a network sees: features on the data by hooks, for any module.

A layer's features are its *input*: the output of the layer before it after activation, norm and residual, also
where those are plain functions. The network's output is the last of them, under the name `output`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from weft.analysis.network import Network, State
from weft.errors import DataError, UsageError, did_you_mean

OUTPUT = "output"


def features(net: Network, state: State, layers: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Layer → its features [n, ...] on all the data, in the order of the calls.

    Layers are the modules without children that own parameters and take floating inputs; `layers(name)` keeps
    some of them. What several layers take as one tensor (queries, keys, values) counts once, for the first of them.
    Raises DataError for features that are NaN or infinite, and names the layer.
    """
    found: dict[str, list[Tensor]] = {}
    for inputs, _ in net.batches:
        with _watched(net.module, layers) as seen, torch.no_grad():
            output = net.call(state, inputs)
        for name, tensor in {**seen, OUTPUT: output}.items():
            found.setdefault(name, []).append(tensor)
    short = [n for n, parts in found.items() if len(parts) < len(net.batches)]
    if short:
        raise UsageError(f"{short[0]} is not called for every batch, so its features cannot be compared")
    made = {n: torch.cat(parts) for n, parts in found.items()}
    for name, tensor in made.items():
        if not bool(tensor.isfinite().all()):
            raise DataError(
                f"the features at {name} are NaN or infinite: look at the inputs and the weights before it"
            )
    return made


def flow(net: Network, state: State) -> list[str]:
    """The names that `features` gives, without keeping them."""
    inputs, _ = net.batches[0]
    with _watched(net.module, None) as seen, torch.no_grad():
        net.call(state, inputs)
    return [*seen, OUTPUT]


def keep_only(net: Network, state: State, names: list[str]) -> Callable[[str], bool]:
    """A filter for the named layers; UsageError for one that is not there."""
    known = flow(net, state)
    for name in names:
        if name not in known:
            raise UsageError(f"there are no features at {name!r}{did_you_mean(name, known)}")
    return lambda name: name in names


@contextmanager
def _watched(module: nn.Module, layers: Callable[[str], bool] | None) -> Iterator[dict[str, Tensor]]:
    """Within the block, the inputs of the layers are put into the mapping as they are called."""
    seen: dict[str, Tensor] = {}
    kept: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(given, Tensor) or not given.is_floating_point():
                return
            if any(given is k for k in kept):
                return
            kept.append(given)
            again = sum(n == name or n.startswith(f"{name}#") for n in seen)
            seen[f"{name}#{again + 1}" if again else name] = given.detach()

        return note

    handles = [
        m.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, m in module.named_modules()
        if not any(True for _ in m.children())
        and any(True for _ in m.parameters(recurse=False))
        and (layers is None or layers(name))
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
