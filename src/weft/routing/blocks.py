"""Which parts of a network are routed: `Block`, a submodule whose weights are made anew, found by name or kind.

A map is a leaf whose output is linear in its weights, so that Σ wₜ f(x; Rₜ) may be added to its output in place of
adding Σ wₜRₜ to its weights: exact, with no weights a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.checkpoints.dtypes import is_mergeable
from weft.errors import Problems, UsageError, did_you_mean

MLPS = ("mlp", "ffn", "ff", "feed_forward", "feedforward")
"""What transformers call the MLP of a block."""
Where = str | Sequence[str]


@dataclass(frozen=True)
class Block:
    """One routed submodule."""

    name: str
    """Its path; empty for the whole network."""
    parameters: tuple[str, ...]
    """Names inside the network, each once."""
    buffers: tuple[str, ...] = field(default=())
    """Floating buffers that are saved (running statistics)."""

    def inside(self, name: str) -> str:
        """A parameter's name inside the block."""
        return name[len(self.name) + 1 :] if self.name else name


def blocks_of(module: nn.Module, where: Where) -> list[Block]:
    """The blocks that `where` means: "all", "linear" (but for heads tied to a table), "mlp", or patterns of
    submodules' names; of what a pattern matches, parts of parts are left out.

    UsageError for a pattern that means none, blocks inside one another, and weights that blocks share.
    """
    modules = dict(module.named_modules())
    patterns = [where] if isinstance(where, str) else list(where)
    names: list[str] = []
    if not patterns:
        raise UsageError("where names no part that could be routed")
    for pattern in patterns:
        found = _meant(pattern, modules)
        if not found:
            raise UsageError(
                f"no part of {type(module).__name__} is {pattern!r}{did_you_mean(pattern, modules)}: give 'all', "
                "'linear', 'mlp', or patterns of submodules' names"
            )
        names += [n for n in found if n not in names]
    inner = [n for n in names if any(m != n and (not m or n.startswith(f"{m}.")) for m in names)]
    if inner:
        raise UsageError(f"{inner[0]} lies inside another routed part: choose one of the two")
    blocks = [_block(module, n) for n in names]
    _check_ties(module, blocks)
    return blocks


def _meant(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    if pattern == "all":
        return [""]
    if pattern == "linear":
        users: dict[int, int] = {}
        for m in modules.values():
            for p in m.parameters(recurse=False):
                users[id(p)] = users.get(id(p), 0) + 1
        return [
            n for n, m in modules.items()
            if isinstance(m, nn.Linear) and n and all(users[id(p)] == 1 for p in m.parameters(recurse=False))
        ]  # fmt: skip
    if pattern == "mlp":
        return [n for n in modules if n.rpartition(".")[2] in MLPS]
    found = [n for n in modules if n and fnmatchcase(n, pattern)]
    return [n for n in found if not any(n.startswith(f"{m}.") for m in found)]  # the outermost of each


def _block(module: nn.Module, name: str) -> Block:
    first = {id(p): n for n, p in module.named_parameters()}
    part = module.get_submodule(name)
    parameters = [first[id(p)] for p in part.parameters() if is_mergeable(p.dtype)]
    kept = part.state_dict()
    dot = f"{name}." if name else ""
    buffers = [dot + n for n, b in part.named_buffers() if n in kept and is_mergeable(b.dtype)]
    if not parameters:
        raise UsageError(f"{name or type(module).__name__} has no weights that could be routed")
    return Block(name, tuple(parameters), tuple(buffers))


def _check_ties(module: nn.Module, blocks: Sequence[Block]) -> None:
    """A weight used in two places cannot have two values at once."""
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    problems = []
    for block in blocks:
        dot = f"{block.name}." if block.name else ""
        for shared in names.values():
            inside = [n for n in shared if n.startswith(dot)]
            if inside and len(inside) < len(shared):
                problems.append(f"{inside[0]} is also {next(n for n in shared if n not in inside)}")
    if problems:
        raise Problems(
            "these weights are tied to others outside the routed part, so leave them out", problems
        )


# -- maps that are linear in their weights ---------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """A leaf that is linear in its weights: f(module, x, W, b)."""

    weight: str | None
    bias: str | None
    channels: int
    """The axis of the outputs' channels."""
    call: Callable[[nn.Module, Tensor, Tensor | None, Tensor | None], Tensor]


def _linear(m: nn.Module, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    assert w is not None
    return F.linear(x, w, b)


def _convolved(m: nn.Module, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    assert isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) and w is not None
    made: Tensor = m._conv_forward(x, w, b)
    return made


def _looked_up(m: nn.Module, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    assert w is not None
    return F.embedding(x, w)


def _layer_normed(m: nn.Module, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    assert isinstance(m, nn.LayerNorm)
    return F.layer_norm(x, m.normalized_shape, w, b, m.eps)


def _group_normed(m: nn.Module, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    assert isinstance(m, nn.GroupNorm)
    return F.group_norm(x, m.num_groups, w, b, m.eps)


def _root_normed(m: nn.Module, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    assert isinstance(m, nn.RMSNorm)
    return F.rms_norm(x, m.normalized_shape, w, m.eps)


_MAPS: Mapping[type, tuple[Callable[..., Tensor], int]] = {
    nn.Linear: (_linear, -1), nn.Conv1d: (_convolved, 1), nn.Conv2d: (_convolved, 1),
    nn.Conv3d: (_convolved, 1), nn.Embedding: (_looked_up, -1), nn.LayerNorm: (_layer_normed, -1),
    nn.GroupNorm: (_group_normed, 1), nn.RMSNorm: (_root_normed, -1),
}  # fmt: skip


def maps_in(module: nn.Module, block: Block, changed: Sequence[str]) -> dict[str, Map] | None:
    """Path inside the block → map, for the leaves that hold the `changed` weights; None where one is no such map.

    Only leaves of just these classes count: a subclass may do something else with its weights.
    """
    part, found, left = module.get_submodule(block.name), dict[str, Map](), set(changed)
    for path, leaf in part.named_modules():
        dot = ".".join(p for p in (block.name, path) if p)
        weight, bias = (f"{dot}.{n}" if dot else n for n in ("weight", "bias"))
        own = {weight, bias} & left
        if not own:
            continue
        if type(leaf) not in _MAPS or (isinstance(leaf, nn.Embedding) and leaf.max_norm is not None):
            return None
        call, channels = _MAPS[type(leaf)]
        found[path] = Map(weight if weight in own else None, bias if bias in own else None, channels, call)
        left -= own
    return None if left else found


def added(
    leaf: nn.Module, made: Map, x: Tensor, y: Tensor, w: Tensor,
    residual: Callable[[str, int], Tensor | None], factors: Callable[[str, int], tuple[Tensor, Tensor] | None],
) -> Tensor:  # fmt: skip
    """y + Σₜ wₜ f(x; Rₜ): w [B, T], or [B, …, T] with weights for each position of x [B, …, d].

    Experts of weight 0 are not computed, and those of weight 0 for most examples only for the others, where no
    gradient is asked for.
    """
    spread = w.dim() > 2
    if spread:
        shape, x, y, w = y.shape, x.flatten(0, -2), y.flatten(0, -2), w.flatten(0, -2)
    elif len(x) != len(w):
        raise UsageError(
            f"{type(leaf).__name__} sees {len(x)} rows for {len(w)} examples, so weights by example cannot be "
            "added to its output: choose how='weights'"
        )
    for t in range(w.shape[-1]):
        c = w[:, t]
        thin = None if made.weight is None else factors(made.weight, t)
        weight = None if made.weight is None or thin is not None else residual(made.weight, t)
        bias = None if made.bias is None else residual(made.bias, t)
        if thin is None and weight is None and bias is None:
            continue
        rows = None
        if not w.requires_grad:
            rows = c.nonzero()[:, 0]
            if not len(rows):
                continue
        few = rows is not None and len(rows) < len(c)
        xt, ct = (x[rows], c[rows]) if few else (x, c)
        found = _through(leaf, made, xt, weight, bias, thin)
        found = found * ct.reshape(-1, *[1] * (found.dim() - 1)).to(found.dtype)
        y = y.index_add(0, rows, found.to(y.dtype)) if few and rows is not None else y + found.to(y.dtype)
    return y.reshape(shape) if spread else y


def _through(
    leaf: nn.Module, made: Map, x: Tensor, w: Tensor | None, b: Tensor | None,
    thin: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """f(x; R) in the residual's precision."""
    dtype = next(p.dtype for p in (w, b, *(thin or ())) if p is not None)
    x = x.to(dtype) if x.is_floating_point() else x
    if thin is not None:
        left, right = thin
        return F.linear(F.linear(x, right), left, b)
    if w is None:
        own: Tensor | None = getattr(leaf, "weight", None)
        w = None if own is None else torch.zeros_like(own, dtype=dtype)
    return made.call(leaf, x, w, b)
