"""Deep-Align: a network that reads two networks and says which units are the same (Navon et al., arXiv:2310.13397).

    Sᴳ = s · F̂ᴳ(θA) F̂ᴳ(θB)ᵀ        π = assignment of S        P = Sinkhorn(S) while it learns

F gives features of every unit of every group G of a `PermutationSpec` and commutes with the symmetries,
F(πθ) = πF(θ), so that S(πθA, ρθB) = π S(θA, θB) ρ⁻¹. Its layers are made from the specification alone: an axis
along which a group stands is an axis of its own, all others are features, as in the paper's layers for the first
and last weights of MLPs. A layer's state is e of every weight and h of every unit. With units i, j, … on its axes

    e'[i, j, …] = e[i, j, …] + relu(W e[i, j, …] + Σ U h[i] + U' h[j] + …)
    h'[i] = h[i] + ψ(h[i], Σ M · mean e')

the mean over all axes but i's, the sum over the tensors and axes that the group stands along, each with maps of its
own. Two such layers in a row hold the equivariant linear maps of the paper's (DWSNets, arXiv:2301.12780), which has
maxima and attention where means are here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.align.data import Line, line
from weft.align.pair import Pair, check_pair
from weft.align.pieces import apart
from weft.align.sinkhorn import sinkhorn
from weft.align.soft import softly_reordered
from weft.align.solving import at_pairs, permutations
from weft.align.spec import PermutationSpec
from weft.align.stored import as_specified
from weft.analysis.network import Network
from weft.engine.writer import write_whole
from weft.errors import DataError, UsageError

NOTE = "weft_deep_align"
MOST = 64
"""Layers of an encoder that is read from a file."""
Stack = Mapping[str, Tensor]
"""Tensors of several networks, `[networks, …]`."""


class Piece(NamedTuple):
    """Part of a tensor with a group along every axis but the first and last: `[networks, *units, features]`."""

    groups: tuple[str, ...]
    at: tuple[tuple[int, ...], ...]
    """For each axis those of the units that it is within, and itself, counted from 0."""
    values: Tensor


def pieces(stack: Stack, spec: PermutationSpec) -> Iterator[Piece]:
    """The tensors of a stack, products opened, chains cut, and what does not move put last; in a fixed order."""
    sizes = {n: g.size for n, g in spec.groups.items()}
    for name, values in stack.items():
        for piece in apart(values, (None, *spec.axes[name]), sizes):
            held = [k for k, label in enumerate(piece.labels) if isinstance(label, str)]
            rest = [k for k in range(1, len(piece.labels)) if k not in held]
            groups = tuple(str(piece.labels[k]) for k in held)
            moved = piece.values.permute(0, *held, *rest)
            shape = moved.shape[: 1 + len(held)]
            yield Piece(groups, _bound(groups, spec), moved.reshape(*shape, -1))


def _bound(groups: Sequence[str], spec: PermutationSpec) -> tuple[tuple[int, ...], ...]:
    last: dict[str, int] = {}
    found = []
    for k, g in enumerate(groups):
        found.append((*(last[w] for w in spec.groups[g].within), k))
        last[g] = k
    return tuple(found)


def _spread(h: Tensor, at: tuple[int, ...], axes: int) -> Tensor:
    """Features of units `[networks, *units, f]` along the axes `at` of a piece, length 1 along the others."""
    order = sorted(range(len(at)), key=lambda i: at[i])
    h = h.permute(0, *(1 + i for i in order), h.dim() - 1)
    lengths = dict(zip(sorted(at), h.shape[1:-1], strict=True))
    return h.reshape(h.shape[0], *(lengths.get(k, 1) for k in range(axes)), h.shape[-1])


def _mean(values: Tensor, at: tuple[int, ...]) -> Tensor:
    """The mean over all axes but `at`, which come in that order."""
    rest = [1 + k for k in range(values.dim() - 2) if k not in at]
    values = values.mean(rest) if rest else values
    kept = sorted(at)
    return values.permute(0, *(1 + kept.index(k) for k in at), values.dim() - 1)


class Layer(nn.Module):
    """One step of the state; see the module's docstring."""

    def __init__(self, spec: PermutationSpec, made: Sequence[Piece], width: int) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in made)
        self.units, self.message = (
            nn.ModuleList(nn.ModuleList(nn.Linear(width, width, bias=False) for _ in p.groups) for p in made)
            for _ in range(2)
        )
        self.before = nn.ModuleList(nn.LayerNorm(width) for _ in spec.groups)
        self.update = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in spec.groups
        )  # fmt: skip

    def forward(
        self, e: list[Tensor], h: dict[str, Tensor], made: Sequence[Piece]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        normed = {g: norm(h[g]) for (g, norm) in zip(h, self.before, strict=True)}
        told = {g: torch.zeros_like(v) for g, v in h.items()}
        after = []
        for i, p in enumerate(made):
            here = self.own[i](e[i])
            for g, at, u in zip(p.groups, p.at, self.units[i], strict=True):  # type: ignore[call-overload]
                here = here + _spread(u(normed[g]), at, len(p.groups))
            after.append(e[i] + F.relu(here))
            for g, at, m in zip(p.groups, p.at, self.message[i], strict=True):  # type: ignore[call-overload]
                told[g] = told[g] + m(_mean(after[i], at))
        pairs = zip(h, self.update, strict=True)
        return after, {g: h[g] + f(torch.cat([normed[g], told[g]], -1)) for g, f in pairs}


class Encoder(nn.Module):
    """θ ↦ features of every unit, F(πθ) = πF(θ); for the networks of one specification.

    `shapes`: of the tensors that it reads. Weights are standardised by `centre` and `spread`, one of each a tensor.
    """

    def __init__(
        self, spec: PermutationSpec, shapes: Mapping[str, Sequence[int]], *, width: int = 48, layers: int = 3
    ) -> None:
        super().__init__()
        self.spec, self.shapes = spec, {n: tuple(s) for n, s in shapes.items()}
        self.width = width
        with torch.device("meta"):
            made = list(pieces({n: torch.empty(1, *s) for n, s in self.shapes.items()}, spec))
        self.enter = nn.ModuleList(nn.Linear(p.values.shape[-1], width) for p in made)
        self.start = nn.ParameterList(  # units that stay are told apart by who they are
            torch.randn(g.size if g.fixed else 1, width) * 0.1 for g in spec.groups.values()
        )
        self.layers = nn.ModuleList(Layer(spec, made, width) for _ in range(layers))
        self.leave = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in spec.movable
        )
        self.scale = nn.Parameter(torch.full((len(spec.movable),), 10.0))
        self.centre = nn.Buffer(torch.zeros(len(self.shapes)))
        self.spread = nn.Buffer(torch.ones(len(self.shapes)))

    def forward(self, stack: Stack) -> dict[str, Tensor]:
        """Features of unit length `[networks, *units, width]` of every movable group."""
        known = zip(self.shapes, self.centre, self.spread, strict=True)
        read = {n: (stack[n].to(self.scale.dtype) - centre) / spread for n, centre, spread in known}
        made = list(pieces(read, self.spec))
        count = made[0].values.shape[0]
        e = [enter(p.values) for enter, p in zip(self.enter, made, strict=True)]
        h = {
            g: start.expand(count, *(self.spec.shape(g)), self.width)
            for g, start in zip(self.spec.groups, self.start, strict=True)
        }
        for layer in self.layers:
            e, h = layer(e, h, made)
        return {
            g: F.normalize(leave(h[g]), dim=-1)
            for g, leave in zip(self.spec.movable, self.leave, strict=True)
        }

    def logits(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of one network's units with another's: `[o, p, …, n, n]`, for all pairs of those that they are within."""
        found = {}
        for k, g in enumerate(self.spec.movable):
            shape = self.spec.shape(g)
            all_pairs = self.scale[k] * a[g].flatten(0, -2) @ b[g].flatten(0, -2).mT
            n = len(shape)
            found[g] = all_pairs.reshape(*shape, *shape).permute([x for i in range(n) for x in (i, n + i)])
        return found

    def paired(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Logits `[…, n, n]` where the units that they are within are known to be the same."""
        for k, g in enumerate(self.spec.movable):
            yield self.scale[k] * a[g] @ b[g].mT


class DeepAlign:
    """A trained aligner: `weft.align(b, to=a, how=aligner)`, `aligner(spec, a, b)`, `aligner.save(path)`."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.spec = encoder.spec

    def __call__(self, spec: PermutationSpec, a: Any, b: Any) -> dict[str, Tensor]:
        """Permutations of b that put its units where a has those like them.

        DataError for networks of another kind than the ones that it was trained on.
        """
        from weft.checkpoints.load import load

        first, second = load(a), load(b)
        if dict(spec.axes) != dict(self.spec.axes) or spec._sizes != self.spec._sizes:
            raise DataError(
                f"{first.origin}: this aligner was trained for other networks, with the groups "
                f"{_sizes(self.spec)}, not {_sizes(spec)}: train one for these (weft.align.deep_align)"
            )
        pair = Pair(spec, first, second)
        both = {n: pair.both(n) for n in self.encoder.shapes}
        with torch.no_grad():
            f, g = (self.encoder({n: t[i][None] for n, t in both.items()}) for i in (0, 1))
            scores = self.encoder.logits({n: x[0] for n, x in f.items()}, {n: x[0] for n, x in g.items()})
        return permutations(spec, lambda group: scores[group].double() if group in scores else None)

    def save(self, path: str | Path) -> None:
        """One safetensors file."""
        from safetensors.torch import save

        e = self.encoder
        about = {"spec": e.spec.to_json(), "shapes": e.shapes, "width": e.width, "layers": len(e.layers)}
        state = {n: t.cpu().contiguous() for n, t in e.state_dict().items()}
        write_whole(Path(path), save(state, {NOTE: json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> DeepAlign:
        """An aligner that `save` wrote; nothing in the file is executed. DataError for any other file."""
        from weft.checkpoints.safetensors import SafetensorsFile, read_header
        from weft.checkpoints.sources import LocalSource
        from weft.checkpoints.strictjson import parse_json

        source = LocalSource(Path(path))
        note = read_header(source).metadata.get(NOTE, "{}")
        about = parse_json(note.encode(), str(path), "config-json", depth=8)
        try:
            spec, layers = PermutationSpec.from_json(about["spec"]), int(about["layers"])
            with torch.device("meta"):  # nothing is made of the sizes that the file tells but what it holds
                encoder = Encoder(spec, about["shapes"], width=int(about["width"]), layers=min(layers, MOST))
            encoder.load_state_dict(SafetensorsFile(source).state_dict(), assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"{path} is no aligner that weft wrote: {error!s:.80}") from None
        return cls(encoder)


def deep_matching(
    spec: PermutationSpec, a: Any, b: Any, *, network: str | Path | DeepAlign
) -> dict[str, Tensor]:
    """Permutations of b by a trained aligner, or the file of one."""
    aligner = network if isinstance(network, DeepAlign) else DeepAlign.load(network)
    return aligner(spec, a, b)


def deep_align(
    spec: PermutationSpec, models: Sequence[Any], net: Network | None = None, *, steps: int = 150, batch: int = 4,
    width: int = 48, layers: int = 3, lr: float = 3e-3, noise: float = 0.5, drop: float = 0.1,
    supervised: float = 1.0, distance: float = 1.0, barrier: float = 1.0, seed: int = 0,
) -> DeepAlign:  # fmt: skip
    """An aligner trained on `models`, networks of one kind trained from other starts, by AdamW.

    Each step takes `batch` pairs. `supervised`: a network and itself with noise, `noise` times the spread of each
    tensor's weights at most and a share `drop` of them zero, are to be found the same, by cross-entropy of rows
    and columns. `distance`: ‖θA − PθB‖² / ‖θA − θB‖² of two different networks. `barrier`: with `net`, the loss of
    (1 − α) θA + α PθB at a random α on a batch of its data. The three are weights. Random
    orders would change nothing but the labels, since the network is equivariant.

    Raises UsageError for fewer than two models, DataProblems where they do not fit the specification.
    """
    from weft.checkpoints.load import load

    if len(models) < 2 or steps < 1 or batch < 1:
        raise UsageError(
            f"an aligner learns from two models or more, in at least one step, not {len(models)} in {steps}"
        )
    if not spec.movable:
        raise UsageError("there is no group of units that may change places, so there is nothing to learn")
    sources = [as_specified(load(m), spec) for m in models]
    for other in sources[1:]:
        check_pair(spec, sources[0], other)
    lines = [line(spec, s, sources[k - 1], net) for k, s in enumerate(sources)]
    stack = {
        n: torch.stack([Pair.finite(x.a[n].float(), n, s) for x, s in zip(lines, sources, strict=True)])
        for n in lines[0].counted
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(spec, {n: t.shape[1:] for n, t in stack.items()}, width=width, layers=layers)
    encoder.centre.copy_(torch.stack([t.mean() for t in stack.values()]))
    encoder.spread.copy_(torch.stack([t.std(correction=0).clamp(min=1e-6) for t in stack.values()]))
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=5e-4, amsgrad=True)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1.0, (k + 1) / rise) * (1 - k / steps)
    )
    for step in range(steps):
        total = torch.zeros(())
        if supervised:
            total = total + supervised * _known(encoder, stack, batch, noise, drop, generator)
        if distance or (barrier and net is not None):
            total = total + _strangers(encoder, lines, stack, batch, distance, barrier, generator, step)
        optimiser.zero_grad()
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return DeepAlign(encoder)


def _known(
    encoder: Encoder, stack: Stack, batch: int, noise: float, drop: float, generator: torch.Generator
) -> Tensor:
    """Cross-entropy of rows and columns of a network's units with its own under noise."""
    chosen = torch.randint(len(next(iter(stack.values()))), (batch,), generator=generator)
    level = noise * torch.rand(batch, generator=generator)

    def shaken(k: int, t: Tensor) -> Tensor:
        some = t[chosen]
        shape = (batch, *[1] * (some.dim() - 1))
        moved = some + encoder.spread[k] * level.reshape(shape) * torch.randn(some.shape, generator=generator)
        return moved * (torch.rand(some.shape, generator=generator) >= drop)

    a, b = (encoder({n: shaken(k, t) for k, (n, t) in enumerate(stack.items())}) for _ in range(2))
    found = []
    for logits in encoder.paired(a, b):
        n = logits.shape[-1]
        target = torch.arange(n).expand(logits.shape[:-1]).flatten()
        found += [F.cross_entropy(x.reshape(-1, n), target) for x in (logits, logits.mT)]
    return torch.stack(found).mean()


def _strangers(
    encoder: Encoder, lines: Sequence[Line], stack: Stack, batch: int, distance: float, barrier: float,
    generator: torch.Generator, step: int,
) -> Tensor:  # fmt: skip
    """The distance of different networks and the loss between them, under soft permutations."""
    spec, chosen = encoder.spec, torch.randperm(len(lines), generator=generator)[: max(2, batch)]
    features = encoder({n: t[chosen] for n, t in stack.items()})
    total = torch.zeros(())
    for k in range(len(chosen)):
        i, j = int(chosen[k]), int(chosen[k - 1])
        logits = encoder.logits(
            {n: f[k] for n, f in features.items()}, {n: f[k - 1] for n, f in features.items()}
        )
        soft = _soft(spec, logits)
        a, b = lines[i].a, lines[j].a
        moved = softly_reordered(b, spec, soft)
        if distance:
            far, near = (sum((a[n] - x[n]).pow(2).sum() for n in stack) for x in (b, moved))
            total = total + distance * near / far
        if barrier and lines[i].net is not None:
            alpha = float(torch.rand((), generator=generator))
            total = total + barrier * lines[i].loss(lines[i].mixed(moved, alpha), step + k)
    return total / len(chosen)


def _soft(spec: PermutationSpec, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Doubly stochastic matrices `[…, n, n]`; of what is within units, for the pairs that these are matched in."""
    outer = {w for g in spec.movable for w in spec.groups[g].within if w in logits}
    known = permutations(
        spec, lambda g: logits[g].detach().double(), tuple(g for g in spec.movable if g in outer)
    )
    return {g: sinkhorn(at_pairs(spec, g, z, known), 1.0, 20, "unrolled") for g, z in logits.items()}


def _sizes(spec: PermutationSpec) -> str:
    told = [f"{n} of {prod(spec.shape(n))}" for n in spec.movable]
    return ", ".join(told[:6]) + (" …" if len(told) > 6 else "")
