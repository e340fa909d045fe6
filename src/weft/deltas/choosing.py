"""Which scheme a tensor gets, and with which numbers: the one asked for, or the cheapest within an error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from weft.checkpoints.dtypes import dtype_name, is_mergeable, round_to
from weft.deltas.exact import Counted, Exact, ExactEncoder, Whole, WholeEncoder, raw
from weft.deltas.groups import group_size
from weft.deltas.lowrank import LowRank, LowRankEncoder, differences, matrices
from weft.deltas.onebit import Sign, SignEncoder
from weft.deltas.pair import Pair
from weft.deltas.positions import index_bytes
from weft.deltas.quantised import Quantised, QuantisedEncoder
from weft.deltas.scheme import Encoder
from weft.deltas.sparse import Largest, SparseEncoder
from weft.deltas.ways import Way
from weft.methods.stats import compared

_GROUP = 128
_RANKS = 64
"""The most singular values that auto looks at."""


def stored_bytes(encoder: Encoder) -> int:
    """Bytes of all parts of a tensor."""
    return sum(i.nbytes for i in encoder.scheme.parts(encoder.pair.info).values())


def choose(pair: Pair, way: Way, exact: bool) -> Encoder | None:
    """What stores a tensor; None where it is the base's. `exact` keeps it from an inexact scheme.

    Vectors (norms, biases) and whole numbers are small and sensitive, so they are always kept exactly, and so is a
    tensor that an inexact scheme would not make smaller.
    """
    if not pair.comparable:
        return WholeEncoder(pair, Whole())
    with pair.prepared():
        if not _changed(pair):
            same = pair.name in pair.base and pair.base.info(pair.name).dtype == pair.info.dtype
            return None if same else lossless(pair)
        inexact = is_mergeable(pair.info.dtype) and len(pair.info.shape) > 1
        if way.scheme == "exact" or exact or not inexact:
            return lossless(pair)
        if way.scheme == "auto":
            return cheapest(pair, way)
        made = asked_for(pair, way)
        return made if stored_bytes(made) < pair.info.nbytes else lossless(pair)


def _changed(pair: Pair) -> bool:
    """Whether a bit differs. Stops at the first range that does."""
    return any(
        not torch.equal(raw(pair.after(a, b)), raw(pair.before(a, b, pair.info.dtype)))
        for a, b in pair.cuts()
    )


def lossless(pair: Pair) -> Encoder:
    """The cheapest exact difference, or the tensor itself."""
    counted = Counted.of(pair)
    made = ExactEncoder(pair, counted.best(), counted)
    return (
        made if stored_bytes(made) < pair.info.nbytes or not pair.info.numel else WholeEncoder(pair, Whole())
    )


def asked_for(pair: Pair, way: Way) -> Encoder:
    """The scheme that `way` names."""
    dtype, info = way.dtype or torch.bfloat16, pair.info
    if way.scheme == "sparse":
        density = 0.1 if way.density is None else way.density
        return _sparse(pair, Largest.of(pair, max(1, round(density * info.numel))), dtype)
    if way.scheme == "lowrank":
        rank = _rank(pair, way)
        return LowRankEncoder(pair, LowRank(rank, dtype_name(dtype)), way.fast, way.seed)
    if way.scheme == "sign":
        return SignEncoder(pair, Sign(group_size(way.group or "tensor", info)))
    size = group_size(way.group or _GROUP, info)
    return QuantisedEncoder(pair, Quantised(way.bits or 4, size))


def _sparse(pair: Pair, largest: Largest, dtype: torch.dtype) -> Encoder:
    return SparseEncoder(pair, largest.scheme(pair.info.numel, dtype), largest)


def _rank(pair: Pair, way: Way) -> int:
    """The rank asked for, or the least with the energy in every matrix of a stack."""
    _, rows, columns = matrices(pair.info)
    most = min(rows, columns, way.rank or (16 if way.energy is None else rows))
    if way.energy is None:
        return most
    from weft.adapters.lowrank import kept_rank

    found = 1
    for tau in differences(pair):
        spectrum = tau.sketched(most, way.seed)[1] if way.fast else tau.spectrum()
        found = max(found, kept_rank(spectrum, rank=most, energy=way.energy))
    return found


# -- the cheapest within an error ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Profile:
    """What one pass tells of τ: how many entries, and how much of ‖τ‖², each magnitude class has.

    A class is the upper half of a float32: sign-less exponent and seven bits, so one is less than 1 % wide.
    """

    counts: Tensor
    energy: Tensor
    total: float
    """Σ |τ|"""
    numel: int

    @classmethod
    def of(cls, pair: Pair) -> Profile:
        counts, energy = torch.zeros(1 << 15, dtype=torch.int64), torch.zeros(1 << 15, dtype=torch.float64)
        total = 0.0
        for a, b in pair.cuts():
            tau = pair.delta(a, b)
            key = (compared(tau).view(torch.int32) >> 16).long()
            counts += torch.bincount(key, minlength=1 << 15)
            energy += torch.bincount(key, tau.square(), minlength=1 << 15)
            total += float(tau.abs().sum())
        return cls(counts, energy, total, pair.info.numel)

    @property
    def squares(self) -> float:
        """‖τ‖²"""
        return float(self.energy.sum())

    @property
    def sign_error(self) -> float:
        """The relative error of s · sign(τ) with one s."""
        return sqrt(max(0.0, 1 - self.total**2 / (self.numel * self.squares))) if self.squares else 0.0

    def sparse(self, error: float) -> tuple[float, int]:
        """(threshold, count) of the fewest classes, from the largest down, that lose no more than `error`."""
        lost = self.energy.cumsum(0)  # energy of this class and all below
        dropped = int((lost <= error**2 * self.squares).sum())
        edge = torch.tensor([min(dropped, (1 << 15) - 1) << 16], dtype=torch.int32).view(torch.float32)
        return float(edge), int(self.counts[dropped:].sum())


def cheapest(pair: Pair, way: Way) -> Encoder:
    """The smallest of all schemes whose measured error is within `way.error`; the exact one if no other is."""
    bound = 0.2 if way.error is None else way.error
    exact = lossless(pair)
    if bound == 0 or (isinstance(exact.scheme, Exact) and not exact.scheme.bits and not exact.scheme.count):
        return exact
    limit = stored_bytes(exact)
    profile = Profile.of(pair)
    tried = sorted(_candidates(pair, way, profile, bound, limit), key=stored_bytes)
    for made in tried:
        if stored_bytes(made) >= limit:
            break
        made.prepare()
        kept = within(pair, made, bound**2 * profile.squares)
        made.forget()
        if kept:
            return made
    return exact


def _candidates(pair: Pair, way: Way, profile: Profile, bound: float, limit: int) -> Iterator[Encoder]:
    """Schemes that may do, as far as a pass over τ and a sketch of it can tell."""
    dtype, info = way.dtype or torch.bfloat16, pair.info
    if profile.sign_error <= bound:
        yield SignEncoder(pair, Sign(info.numel))
    size = group_size(way.group or _GROUP, info)
    for bits in (2, 3, 4, 6, 8):
        yield QuantisedEncoder(pair, Quantised(bits, size))
    # values are rounded, too: a little less may be dropped
    threshold, count = profile.sparse(bound * (1 - torch.finfo(dtype).eps))
    if count > 0 and index_bytes(info.numel, count) + count * dtype.itemsize < limit:
        yield _sparse(pair, Largest.over(pair, threshold), dtype)
    stack, rows, columns = matrices(info)
    per_rank = stack * (rows + columns) * dtype.itemsize
    most = min(_RANKS, rows, columns, (limit - 1) // per_rank)
    if most > 0:
        rank = _enough(pair, most, bound * (1 - torch.finfo(dtype).eps), way.seed)
        if rank is not None:
            yield LowRankEncoder(pair, LowRank(rank, dtype_name(dtype)), True, way.seed)


def _enough(pair: Pair, most: int, bound: float, seed: int) -> int | None:
    """The least rank at which a sketch of every matrix loses no more than `bound`; None beyond `most`."""
    found = 1
    for tau in differences(pair):
        made, spectrum = tau.sketched(most, seed)
        kept = spectrum[:most].square().cumsum(0)
        enough = (made.norm**2 - kept <= bound**2 * made.norm**2).nonzero()
        if made.norm and not len(enough):
            return None
        found = max(found, int(enough[0]) + 1) if made.norm else found
    return found


def within(pair: Pair, encoder: Encoder, most: float) -> bool:
    """Whether ‖θ̂ − θ‖² ≤ `most`, with θ̂ as it would be read back and saved. Stops where it is more."""
    error = 0.0
    for a, b in pair.cuts():
        decoded = encoder.scheme.decode(encoder.encode, pair.before, pair.info, a, b)
        after = pair.after(a, b)
        error += float((round_to(decoded, pair.info.dtype).double() - after.double()).square().sum())
        if not error <= most:
            return False
    return True
