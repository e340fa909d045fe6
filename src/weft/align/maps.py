"""Units mixed rather than reordered: a map for each group, and a checkpoint to which they are applied lazily.

Where units are written (rows of a weight, biases, embeddings) a new unit is Σ_i into[j, i] · (old unit i); where
they are read (columns of the weight that follows), old unit i is taken to be Σ_j out[j, i] · (new unit j):

    W' = into_ℓ · W · out_{ℓ−1}ᵀ        b' = into_ℓ · b

For a permutation both are the same matrix. A hard plan, a soft plan, a change of width, a change of basis (CCA)
and a zip are different choices of the two. Groups that hold others (heads, experts) are permuted, never mixed: a
mixture of heads is not attention. Groups within them have a map for each unit of the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from string import ascii_letters

import torch
from torch import Tensor

from weft.align.apply import SMALL
from weft.align.networks import Net, Reads
from weft.align.pieces import Labels, apart, together
from weft.align.spec import Axis, Permutations, PermutationSpec
from weft.align.terms import groups_in, size_of
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range
from weft.errors import DataProblems, UsageError


@dataclass(frozen=True)
class Mix:
    """How the units of a group are mixed: float64 [*units of the groups it is within, new, old] both."""

    into: Tensor
    out: Tensor

    @classmethod
    def of(cls, permutation: Tensor) -> Mix:
        """The mixture that is a permutation [..., n]."""
        hard = torch.nn.functional.one_hot(permutation, permutation.shape[-1]).double()
        return cls(hard, hard)

    @classmethod
    def of_plan(cls, plan: Tensor) -> Mix:
        """From masses moved [..., new, old]: new units are means of old ones, old ones are spread over new."""
        return cls(
            plan / plan.sum(-1, keepdim=True).clamp_min(1e-300),
            plan / plan.sum(-2, keepdim=True).clamp_min(1e-300),
        )

    @property
    def hard(self) -> bool:
        """Whether it is a permutation."""
        one = ((self.into == 0) | (self.into == 1)).all() and (self.into.sum(-1) == 1).all()
        return bool(one) and self.into.shape[-1] == self.into.shape[-2] and torch.equal(self.into, self.out)


Transport = Mapping[str, Mix]


def mixed(
    values: Tensor, row: tuple[Axis, ...], spec: PermutationSpec, transport: Transport, reads: frozenset[int]
) -> Tensor:
    """One tensor with its units mixed, in float64; `reads` are the axes along which it reads. Differentiable."""
    sizes = {n: g.size for n, g in spec.groups.items()}
    labels: Labels = tuple(s if t is None else t for t, s in zip(row, values.shape, strict=True))
    made = (
        _piece(p.values.double(), p.labels, p.axes, spec, transport, reads) for p in apart(values, row, sizes)
    )
    return together(made, labels)


def _piece(
    values: Tensor, labels: Labels, axes: tuple[int, ...], spec: PermutationSpec, transport: Transport,
    reads: frozenset[int],
) -> Tensor:  # fmt: skip
    letters = ascii_letters[: len(labels)]
    for i, label in enumerate(labels):
        if not isinstance(label, str) or label not in transport:
            continue
        mix = transport[label]
        outer = "".join(letters[labels.index(w)] for w in spec.groups[label].within)
        old, new = letters[i], "Z"
        matrix = mix.out if axes[i] in reads else mix.into
        values = torch.einsum(
            f"{letters},{outer}{new}{old}->{letters.replace(old, new)}", values, matrix.to(values.device)
        )
    return values


class Transported(Derived):
    """A checkpoint with its units mixed, its tensors as wide as the maps make them; computed as it is read.

    Raises UsageError where a group that holds others is to be mixed, or a tied tensor is both written and read
    along units that a soft map mixes; DataProblems where the model does not fit the specification.
    """

    def __init__(
        self, source: Checkpoint, spec: PermutationSpec, transport: Transport, reads: Reads,
        like: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        super().__init__(source)
        self.spec, self.transport, self.like = spec, dict(transport), like
        spec.check(source)
        self._reads = {n: frozenset(k for m, k in reads if m == n) for n in source.tensors}
        self._check(reads)
        made = {n: mix.into.shape[-2] for n, mix in transport.items()}
        self._sizes = {n: g.size for n, g in spec.groups.items()} | made
        self.origin = f"{source.origin} transported"
        self._tensors = {n: TensorInfo(self._shape(n), i.dtype) for n, i in source.tensors.items()}

    def _check(self, reads: Reads) -> None:
        problems = []
        for name, mix in self.transport.items():
            group = self.spec.group(name)
            if self.spec.inner(name):
                problems.append(
                    f"{name}: it holds {', '.join(self.spec.inner(name))}, so it is permuted, not mixed"
                )
            lead = tuple(self.spec.groups[w].size for w in group.within)
            if (
                mix.into.shape[:-2] != lead
                or mix.into.shape[-1] != group.size
                or mix.into.shape != mix.out.shape
            ):
                problems.append(f"{name}: maps of shape {[*lead, 'new', group.size]} are needed, not "
                                f"{list(mix.into.shape)} and {list(mix.out.shape)}")  # fmt: skip
        for alias, name in self.first.aliases.items():
            for k in self._reads.get(name, ()):
                problems += [
                    f"{name}: tied to {alias}, written by one name and read by the other along {g}, which only a "
                    "permutation satisfies: untie them or take a hard plan"
                    for g in groups_in(self.spec.axes[name][k])
                    if g in self.transport and not self.transport[g].hard
                ]
        if problems:
            raise DataProblems(f"{self.first.origin} cannot be transported so", problems)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def config(self) -> Mapping[str, object] | None:
        return self.first.config if self.like is None else self.like.config

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.first.info(name).shape
        return tuple(
            s if t is None else size_of(t, self._sizes) or s
            for t, s in zip(self.spec.axes[name], shape, strict=True)
        )

    def _moved(self, name: str) -> list[int]:
        """Axes along which something is mixed."""
        if not is_mergeable(self.first.info(name).dtype):
            return []
        row = self.spec.axes[name]
        return [k for k, t in enumerate(row) if any(g in self.transport for g in groups_in(t))]

    def _by_rows(self, name: str) -> bool:
        """Whether rows can be had one by one: nothing is mixed along the first axis, nor for each unit of it."""
        moved = self._moved(name)
        groups = [g for k in moved for g in groups_in(self.spec.axes[name][k]) if g in self.transport]
        info = self.first.info(name)
        return (
            0 not in moved
            and not any(self.spec.groups[g].within for g in groups)
            and info.numel > SMALL
            and not self._row(self.first, name) % self.first.grain(name)
        )

    @staticmethod
    def _row(source: Checkpoint, name: str) -> int:
        return max(1, prod(source.info(name).shape[1:]))

    def grain(self, name: str) -> int:
        if not self._moved(name):
            return self.first.grain(name)
        return self._row(self, name) if self._by_rows(name) else max(1, self.info(name).numel)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info, row = self.info(name), self.spec.axes.get(name, ())
        if not self._moved(name):
            return self.first.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        shape = self.first.info(name).shape
        if self._by_rows(name):
            there, here = self._row(self.first, name), self._row(self, name)
            rows = range(start // here, -(-stop // here))
            values = self.first.read(name, rows.start * there, rows.stop * there)
            shape, row = (len(rows), *shape[1:]), (None, *row[1:])
            start, stop = 0, stop - start
        else:
            values = self.first.read(name)
        made = mixed(values.reshape(shape), row, self.spec, self.transport, self._reads[name])
        made = made.reshape(-1)[start:stop]
        return made if dtype is None else round_to(made, dtype)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if not self._moved(name):
            self.first.prefetch(name, start, stop)

    def working_bytes(self, name: str, count: int) -> int:
        if not self._moved(name):
            return self.first.working_bytes(name, count)
        read, made = self.first.info(name).numel, self.info(name).numel
        if self._by_rows(name):
            read = -(-count // self._row(self, name)) * self._row(self.first, name)
            made = count
        return self.first.working_bytes(name, read) + 32 * max(read, made)

    def identity(self) -> str | None:
        inner = super().identity()
        if inner is None:
            return None
        told = hashlib.sha256(
            str(self.spec.to_json()["axes"]).encode() + str(sorted(self._reads.items())).encode()
        )
        for name in sorted(self.transport):
            for m in (self.transport[name].into, self.transport[name].out):
                told.update(name.encode() + m.contiguous().numpy().tobytes())
        return f"{told.hexdigest()}{inner}"


def transported(net: Net, permutations: Permutations, transport: Transport) -> Checkpoint:
    """A model with the units of some groups reordered and those of others mixed: a lazy checkpoint."""
    from weft.align.apply import Permuted

    both = set(permutations) & set(transport)
    if both:
        raise UsageError(f"{sorted(both)[0]} is both permuted and mixed")
    moved: Checkpoint = Permuted(net.checkpoint, net.spec, permutations) if permutations else net.checkpoint
    return Transported(moved, net.spec, transport, net.reads) if transport else moved
