"""`deepened`: new layers that change nothing yet, somewhere in a stack (arXiv:1511.05641).

residual block   x + 0: a copy of the block before it whose last maps are zeros
activation       σ(I x): an identity layer and the activation again, where σ(σ(x)) = σ(x), as of ReLU
linear, conv     I W x: an identity map behind another
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from weft.align.networks import Net, opened
from weft.align.terms import groups_in
from weft.api import Model
from weft.checkpoints.company import InCompany
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError, did_you_mean
from weft.statistics.placed import placed
from weft.transform.reshaped import TOLERANCE, Reshaped, change_of

IDEMPOTENT = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Hardtanh)
"""Activations with σ(σ(x)) = σ(x)."""


def deepened(
    model: Model,
    after: int | Sequence[int],
    *,
    stack: str = "",
    module: nn.Module | None = None,
    example_inputs: Any = None,
) -> Reshaped:
    """`model` with a new layer behind each item of a stack that `after` names (twice for two).

    `stack` is the nn.Sequential or nn.ModuleList that is grown, "" for the network itself. What is put there
    depends on the item: see the module. Later items move up, so names of tensors are those of a network made
    that deep. Configs of transformers count the new layers.

    The result is checked by running both in float64. Raises UsageError where there is no such stack or item, or its
    activation is none that can be repeated; DataError where the function would change (a norm behind the
    residual sum, a network that reads its stack in its own way).
    """
    net, source = placed(model, module)
    view = opened([net], example_inputs=example_inputs)[0]
    items = items_of(net, stack)
    places = sorted([after] if isinstance(after, int) else list(after))
    if not places or not all(type(i) is int and 0 <= i < len(items) for i in places):
        raise UsageError(
            f"after must name items from 0 to {len(items) - 1} of {stack or 'the network'}, not {after!r}"
        )
    made = copy.deepcopy(net)
    shapes = _shapes(net, stack, view)
    fresh: list[nn.Module] = []
    for i, item in enumerate(items_of(made, stack)):
        fresh.append(item)
        for _ in range(places.count(i)):
            fresh += _layer(view, stack, items, i, shapes)
    made = with_stack(made, stack, fresh)
    _count(made, len(items), len(fresh))
    change = change_of(net, made, view.example)
    if not change <= TOLERANCE:
        raise DataError(
            f"{type(net).__name__} would compute something else (by {change:.1e}): a new layer in "
            f"{stack or 'its stack'} cannot be the identity there, as where a norm or an activation follows the sum"
        )
    config: Any = getattr(made, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else source.config
    checkpoint = InCompany(StateDict(made, f"{source.origin}, deepened"), told, source.assets)
    return Reshaped(made, checkpoint, change, {"stack": stack, "after": places, "layers": len(fresh)})


def items_of(net: nn.Module, stack: str) -> list[nn.Module]:
    """The items of a stack; UsageError where there is none of that name."""
    known = dict(net.named_modules())
    found = known.get(stack)
    if not isinstance(found, nn.Sequential | nn.ModuleList):
        there = [n for n, m in known.items() if isinstance(m, nn.Sequential | nn.ModuleList)]
        listed = ", ".join(n or "''" for n in there) or "none"
        raise UsageError(f"there is no stack {stack!r}{did_you_mean(stack, there)}; stacks (nn.Sequential, "
                         f"nn.ModuleList) in {type(net).__name__}: {listed}")  # fmt: skip
    return list(found)


def with_stack(net: nn.Module, stack: str, items: Sequence[nn.Module]) -> nn.Module:
    """The network with other items in its stack; a stack alone is made anew."""
    made = type(net.get_submodule(stack))
    fresh = nn.Sequential(*items) if issubclass(made, nn.Sequential) else nn.ModuleList(items)
    if not stack:
        return fresh.eval()
    path, _, leaf = stack.rpartition(".")
    setattr(net.get_submodule(path), leaf, fresh)
    return net.eval()


def _shapes(net: nn.Module, stack: str, view: Net) -> dict[int, tuple[int, ...]]:
    """The shape of every item's output."""
    found: dict[int, tuple[int, ...]] = {}

    def note(i: int, y: Any) -> None:
        y = y[0] if isinstance(y, tuple) else y
        if isinstance(y, Tensor):
            found[i] = tuple(y.shape)

    hooks = [
        m.register_forward_hook(lambda m, a, y, i=i: note(i, y)) for i, m in enumerate(items_of(net, stack))
    ]
    with torch.no_grad():
        net(*view.example.args, **dict(view.example.kwargs))
    for hook in hooks:
        hook.remove()
    return found


def _layer(
    view: Net, stack: str, items: Sequence[nn.Module], i: int, shapes: dict[int, tuple[int, ...]]
) -> list[nn.Module]:
    """What is put behind item i."""
    item = items[i]
    if list(item.children()):
        return [_silent(view, f"{stack}.{i}".lstrip("."), item)]
    near = next((m for m in reversed(items[: i + 1]) if is_map(m)), None)
    if i not in shapes or near is None:
        raise UsageError(f"item {i} of {stack or 'the network'} is no layer that a new one can follow")
    if is_map(item):
        return [_identity(item, shapes[i])]
    if next(item.parameters(), None) is not None or not isinstance(item, IDEMPOTENT):
        kinds = ", ".join(c.__name__ for c in IDEMPOTENT)
        raise UsageError(
            f"item {i} is a {type(item).__name__}: no identity layer can stand behind it, only behind linear "
            f"layers, convolutions, residual blocks and {kinds}"
        )
    behind = [m for m in items[items.index(near) + 1 : i] if isinstance(m, _BatchNorm)]
    return [_identity(near, shapes[i]), *(_passing(m) for m in behind), copy.deepcopy(item)]


def is_map(m: nn.Module) -> bool:
    """A linear layer or a convolution."""
    return isinstance(m, nn.Linear) or (isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd))


def _identity(like: Any, shape: tuple[int, ...]) -> nn.Module:
    """A linear layer or convolution of the kind of `like` that gives what it gets."""
    p = like.weight
    if isinstance(like, nn.Linear):
        made: Any = nn.Linear(shape[-1], shape[-1], bias=like.bias is not None)
        with torch.no_grad():
            made.weight.copy_(torch.eye(shape[-1]))
    else:
        channels = shape[1]
        size = tuple(k if k % 2 else k + 1 for k in like.kernel_size)
        made = type(like)(
            channels, channels, size, padding=tuple(k // 2 for k in size), bias=like.bias is not None
        )
        nn.init.dirac_(made.weight)
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made.to(p.device, p.dtype)  # type: ignore[no-any-return]


def _passing(like: Any) -> nn.Module:
    """A BatchNorm that gives what it gets, in evaluation mode: γ = √(1 + ε), mean 0, variance 1."""
    made: Any = copy.deepcopy(like)
    with torch.no_grad():
        if made.running_mean is None or made.weight is None:
            raise UsageError("a BatchNorm without running statistics or scale cannot be the identity")
        made.running_mean.zero_()
        made.running_var.fill_(1.0)
        made.weight.fill_((1 + made.eps) ** 0.5)
        made.bias.zero_()
    return made  # type: ignore[no-any-return]


def _silent(view: Net, name: str, block: nn.Module) -> nn.Module:
    """A copy of a block that adds nothing: the maps that write what leaves it, or BatchNorms behind, are 0."""
    from weft.calibrate.network import sites

    inside = f"{name}."
    outside = {
        g for n, row in view.spec.axes.items() if not n.startswith(inside) for t in row for g in groups_in(t)
    }
    behind = {}  # map → the BatchNorm that its output goes straight into
    before = None
    for site in sites(view.module, view.example, view.forward):
        if before is not None and before.normed and site.kind == "batchnorm":
            behind[before.name] = site.name
        before = site
    made = copy.deepcopy(block)
    named = {f"{inside}{n}": p for n, p in made.named_parameters()}
    silenced = False
    for name_of_map in dict.fromkeys(n for n, _ in view.reads if n.startswith(inside)):
        row = view.spec.axes[name_of_map]
        written = {g for k, t in enumerate(row) if (name_of_map, k) not in view.reads for g in groups_in(t)}
        if not written & outside:
            continue
        layer = name_of_map.rpartition(".")[0]
        last = behind.get(layer)
        for n in (name_of_map, f"{layer}.bias") if last is None else (f"{last}.weight", f"{last}.bias"):
            if n in named:
                nn.init.zeros_(named[n])
        silenced = True
    if not silenced:
        raise DataError(f"{name} has no map that writes what leaves it, so it cannot be made to add nothing")
    return made


def _count(net: Any, old: int, new: int) -> None:
    """Tell a config of transformers, and layers that know their number, of the new depth."""
    config = getattr(net, "config", None)
    if config is None:
        return
    for key, value in list(vars(config).items()):
        if value == old and type(value) is int and ("layer" in key) and key.lower().startswith(("n", "num")):
            setattr(config, key, new)
        elif isinstance(value, list) and len(value) == old and key == "layer_types":
            setattr(config, key, [*value, *value[-1:] * (new - old)])
    seen: dict[str, int] = {}
    for name, m in net.named_modules():
        if type(getattr(m, "layer_idx", None)) is int:
            index = next((int(p) for p in reversed(name.split(".")) if p.isdigit()), None)
            if index is not None:
                m.layer_idx = seen[name] = index
