"""What each expert adds to a tensor, stored in one of the ways in which deltas are: `Residual`.

full          as it is
lowrank:r     L R, the best of rank r (a share of the rank for r < 1; ⌊p/T⌋ without a number, as TSV-C)
essential:r   P Pᵀ R along the r directions in which outputs change most (ESM++; needs Gram matrices)
sparse:d      the largest entries, a share d; a share of 0.1 without a number
sign          one bit an entry and one scale (BitDelta)
quantised:b   b bits an entry, 4 without a number (TVQ)
emr           s · m ⊙ u: one elected vector for all experts, one bit an entry and one scale for each
tall:ℓ        m ⊙ Στ with TALL masks at a threshold, 0.4 without a number

Vectors (norms, biases) are small and always full, but for the last two. So is a matrix that a way would not make
smaller. A residual of zeros is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import dtype_name, round_to
from weft.checkpoints.memory import StateDict
from weft.deltas.choosing import asked_for
from weft.deltas.exact import Whole
from weft.deltas.format import SCHEMES
from weft.deltas.lowrank import LowRank, matrices
from weft.deltas.pair import Pair
from weft.deltas.scheme import Scheme
from weft.deltas.ways import Way
from weft.errors import UsageError, did_you_mean
from weft.methods.spectral import shares
from weft.routing.masked import Masked, masked

KINDS = ("full", "lowrank", "essential", "sparse", "sign", "quantised", "emr", "tall")
SHARED_VECTOR = ("emr", "tall")
"""Kinds whose experts are all masks of one vector."""
STORED: dict[str, type] = {k: s for k, s in SCHEMES.items() if k != "exact"} | {Masked.kind: Masked}
"""Schemes by the name that a file gives them; `exact` counts in units of a base's dtype and means nothing here."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """How residuals are kept: a kind and its number."""

    kind: str
    number: float | None = None
    dtype: torch.dtype = torch.float32
    """Of values and factors."""

    @classmethod
    def parse(cls, text: str, dtype: torch.dtype = torch.float32) -> Keeping:
        """From `kind` or `kind:number`. UsageError for what cannot be meant."""
        kind, colon, rest = text.partition(":")
        if kind not in KINDS:
            raise UsageError(
                f"there is no residual {kind!r}{did_you_mean(kind, KINDS)}; known: {', '.join(KINDS)}"
            )
        if kind in ("full", "sign", "emr") and colon:
            raise UsageError(f"the residual {kind} takes no number, not {rest!r}")
        if not colon:
            return cls(kind, {"sparse": 0.1, "quantised": 4.0, "tall": 0.4}.get(kind), dtype)
        try:
            number = float(rest)
        except ValueError:
            raise UsageError(f"{text!r}: {rest!r} is no number") from None
        whole = number == int(number) if abs(number) < 2**31 else False
        fits = {
            "lowrank": 0 < number < 1 or (number >= 1 and whole), "essential": number >= 1 and whole,
            "sparse": 0 < number <= 1, "quantised": 1 <= number <= 8 and whole, "tall": number >= 0,
        }[kind]  # fmt: skip
        if not fits:
            raise UsageError(f"{text!r}: {rest} cannot be the number of a residual {kind}")
        return cls(kind, number, dtype)

    def rank(self, info: TensorInfo, experts: int) -> int:
        """The rank kept of a matrix: at least one, at most what it has."""
        _, rows, columns = matrices(info)
        p = min(rows, columns)
        if self.number is None:
            return shares(p, None, experts)
        return min(p, int(self.number)) if self.number >= 1 else max(1, int(self.number * p))


class Residual(nn.Module):
    """The T residuals of one tensor. Values kept full and thin factors are parameters, so they can be trained."""

    def __init__(
        self, shape: Sequence[int], schemes: Sequence[Scheme | None], parts: Sequence[Mapping[str, Tensor]],
        over: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shape, self.schemes = tuple(shape), list(schemes)
        self.register_buffer("vector", over)
        for t, stored in enumerate(parts):
            for name, value in stored.items():
                if isinstance(schemes[t], Whole | LowRank):
                    self.register_parameter(f"{t}_{name}", nn.Parameter(value, requires_grad=False))
                else:
                    self.register_buffer(f"{t}_{name}", value)
        self._unpacked: dict[int, Tensor] | None = None

    @property
    def trainable(self) -> bool:
        """Whether every stored residual is made of numbers that a gradient can move."""
        return all(s is None or isinstance(s, Whole | LowRank) for s in self.schemes)

    @property
    def over(self) -> Tensor | None:
        """u, where residuals are masks of it."""
        found: Tensor | None = self._buffers["vector"]
        return found

    @property
    def empty(self) -> bool:
        return all(s is None for s in self.schemes)

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, torch.float32)

    def part(self, t: int, name: str) -> Tensor:
        found: Tensor = getattr(self, f"{t}_{name}")
        return found

    def of(self, t: int) -> Tensor | None:
        """R_t in float32 (float64 where it is stored so), None for zeros; differentiable where trainable."""
        scheme = self.schemes[t]
        if scheme is None:
            return None
        if isinstance(scheme, Whole):
            return wide(self.part(t, "whole"))
        if isinstance(scheme, LowRank):
            return (wide(self.part(t, "left")) @ wide(self.part(t, "right"))).reshape(self.shape)
        if self._unpacked is not None and t in self._unpacked:
            return self._unpacked[t]
        made = self._decoded(t, scheme)
        if self._unpacked is not None:
            self._unpacked[t] = made
        return made

    def _decoded(self, t: int, scheme: Scheme) -> Tensor:
        device = self.part(t, next(iter(scheme.parts(self.info)))).device
        over = torch.zeros(self.info.numel) if self.over is None else self.over.reshape(-1).cpu()

        def part(name: str, start: int, stop: int) -> Tensor:
            return self.part(t, name).reshape(-1)[start:stop].cpu()

        def base(start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
            return over[start:stop]

        values = scheme.decode(part, base, self.info, 0, self.info.numel)
        return values.float().reshape(self.shape).to(device)

    def factors(self, t: int) -> tuple[Tensor, Tensor] | None:
        """L [m, r] and R [r, n] of a matrix kept at low rank."""
        if not isinstance(self.schemes[t], LowRank) or len(self.shape) != 2:
            return None
        return wide(self.part(t, "left")[0]), wide(self.part(t, "right")[0])

    def unpack(self, keep: bool) -> None:
        """Keep what is decoded in memory, or forget it and decode at each call."""
        self._unpacked = {} if keep else None

    def stored(self) -> Iterator[tuple[int | None, str, Tensor]]:
        """(expert, part, value) of all that is stored; expert None for the vector that masks are over."""
        if self.over is not None:
            yield None, "over", self.over
        for t, scheme in enumerate(self.schemes):
            for name in () if scheme is None else scheme.parts(self.info):
                yield t, name, self.part(t, name).detach()

    def working(self, t: int) -> int:
        """Multiply-adds of the expert's product with one input row."""
        if self.schemes[t] is None or len(self.shape) < 2:
            return 0
        found = self.factors(t)
        return self.info.numel if found is None else found[0].numel() + found[1].numel()


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


# -- encoding ----------------------------------------------------------------------------------------------


def kept(tau: Sequence[Tensor], how: Keeping, grams: Sequence[Tensor | None] | None = None) -> Residual:
    """The residual of one tensor; tau: T of [*shape], float32 or float64. `emr` and `tall`: see `masks_of`."""
    pairs = [_kept(t, how, len(tau), None if grams is None else grams[i]) for i, t in enumerate(tau)]
    return Residual(tau[0].shape, [s for s, _ in pairs], [p for _, p in pairs])


def _kept(
    tau: Tensor, how: Keeping, experts: int, gram: Tensor | None
) -> tuple[Scheme | None, Mapping[str, Tensor]]:
    if not bool(tau.any()):
        return None, {}
    whole = round_to(tau, how.dtype)
    full = (Whole(), {"whole": whole})
    if how.kind == "full" or tau.dim() < 2:
        return full
    if how.kind == "essential" and gram is not None and tau.dim() == 2:
        made: tuple[Scheme, Mapping[str, Tensor]] = _essential(tau, gram, how, experts)
    else:
        made = _encoded(tau, _way(how, TensorInfo(tuple(tau.shape), torch.float32), experts))
    return made if sum(p.nbytes for p in made[1].values()) < whole.nbytes else full


def _way(how: Keeping, info: TensorInfo, experts: int) -> Way:
    if how.kind in ("lowrank", "essential"):
        return Way("lowrank", rank=how.rank(info, experts), dtype=how.dtype)
    if how.kind == "sparse":
        return Way("sparse", density=how.number, dtype=how.dtype)
    return Way("sign") if how.kind == "sign" else Way("quantised", bits=int(how.number or 4))


def _encoded(tau: Tensor, way: Way) -> tuple[Scheme, Mapping[str, Tensor]]:
    """One residual by a scheme of the deltas'."""
    x = tau.float().cpu().contiguous()
    pair = Pair(StateDict({"tau": x}), StateDict({"tau": torch.zeros_like(x)}), "tau")
    encoder = asked_for(pair, way)
    encoder.prepare()
    wanted = encoder.scheme.parts(pair.info)
    made = {n: encoder.encode(n, 0, i.numel).reshape(i.shape).to(tau.device) for n, i in wanted.items()}
    return encoder.scheme, made


def _essential(tau: Tensor, gram: Tensor, how: Keeping, experts: int) -> tuple[Scheme, Mapping[str, Tensor]]:
    """P Pᵀ τ along the leading directions P of the outputs' change τ G^½."""
    from weft.methods.esm import shift

    rank = how.rank(TensorInfo(tuple(tau.shape), torch.float32), experts)
    p = shift(tau.double(), gram.double().to(tau.device), rank).u
    if not p.shape[1]:  # its inputs never see the change
        return _encoded(tau, Way("lowrank", rank=rank, dtype=how.dtype))
    left, right = round_to(p, how.dtype)[None], round_to(p.T @ tau.double(), how.dtype)[None]
    return LowRank(p.shape[1], dtype_name(how.dtype)), {"left": left, "right": right}


def masks_of(tau: Mapping[str, Sequence[Tensor]], how: Keeping) -> dict[str, Residual]:
    """Residuals that are masks of one vector a tensor, of all tensors together: EMR's scales are the model's."""
    from weft.methods.masks import emr_masks, emr_rescalers, tall_mask, unify

    stacks = {name: torch.stack([t.float() for t in each]) for name, each in tau.items()}
    scales = emr_rescalers(stacks.values()).tolist() if how.kind == "emr" else None
    made = {}
    for name, x in stacks.items():
        if not bool(x.any()):
            made[name] = Residual(x.shape[1:], [None] * len(x), [{}] * len(x))
            continue
        vector = unify(x) if how.kind == "emr" else x.sum(0)
        mask = emr_masks(x, vector) if how.kind == "emr" else tall_mask(x, vector, how.number or 0.0)
        parts = [masked(m, 1.0 if scales is None else scales[t]) for t, m in enumerate(mask)]
        made[name] = Residual(x.shape[1:], [Masked()] * len(x), parts, vector)
    return made


def gram_of(statistics: Checkpoint | None, name: str) -> Tensor | None:
    """The Gram matrix [in, in] of one weight, if it was measured as one."""
    if statistics is None or f"gram/{name}" not in statistics:
        return None
    found: Any = statistics.tensor(f"gram/{name}")
    found = found[0] if found.dim() == 3 and len(found) == 1 else found
    return found if found.dim() == 2 else None
