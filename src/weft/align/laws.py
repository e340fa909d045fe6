"""Symmetries that are no permutations: bases that a network cannot tell apart, and scales that cancel.

A `Law` is a group of matrices M that acts along axes of several tensors at once, for each unit of `outer` (heads)
with a matrix of its own. An axis's term says where: "x" is what M moves, "x/dual" what its inverse transpose moves,
so that their product stays (queries and keys, values and the output map, what writes and what reads units).

    linear      any M with an inverse                 orthogonal   MMᵀ = 1
    scale       diagonal, positive                    centred      orthogonal, and the mean stays: M1 = 1
    planes      a rotation and a scale of every pair of positions, as rotary embeddings leave them

A scale law that has a norm's gain on one side and all that reads the norm on the other (`gain`) is how gains are
folded. Orthogonal laws of a residual stream hold where gains are 1: `Symmetries.apply` folds, turns, and unfolds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from weft.align.pieces import apart, together
from weft.align.spec import Axis
from weft.align.terms import parsed, size_of, written
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range
from weft.engine.writer import write_whole
from weft.errors import DataError, DataProblems, Problems, did_you_mean

Kind = Literal["linear", "orthogonal", "centred", "planes", "scale"]
Pairs = Literal["halves", "neighbours"]
PAIRS: tuple[Pairs, ...] = ("halves", "neighbours")
Members = Mapping[str, Tensor]
"""Law → a matrix `[*outer, n, n]`; of scale laws its diagonal `[*outer, n]`."""
X, DUAL = "x", "x/dual"


@dataclass(frozen=True)
class Law:
    """A group of matrices and where it acts. See the module's docstring."""

    kind: Kind
    size: int
    outer: Mapping[str, int]
    """Groups for each of whose units there is a matrix, with their sizes."""
    rows: Mapping[str, tuple[tuple[Axis, ...], ...]]
    """Tensor → for each place in it what stands along its axes: "x" or "x/dual", outer groups, lengths."""
    pairs: Pairs | None = None
    """Of planes: position i with i + n/2, or with its neighbour."""
    gain: str | None = None
    """The norm's gain, which folding makes 1."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {**self.outer, X: self.size, DUAL: self.size}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a member."""
        return (*self.outer.values(), *[self.size] * (1 if self.kind == "scale" else 2))

    def parts(self, name: str, values: Tensor) -> Iterator[Part]:
        """The parts of a tensor that are moved, `[*outer, n, all else]`, views where that can be."""
        for row in self.rows[name]:
            for piece in apart(values, row, self.sizes):
                order = _order(self, piece.labels)
                if order is not None:
                    moved = piece.values.permute(order)
                    yield Part(moved.reshape(*moved.shape[: len(self.outer) + 1], -1), DUAL in piece.labels)

    def turned(self, name: str, values: Tensor, member: Tensor) -> Tensor:
        """A tensor moved by a member."""
        m, dual = member.to(values.dtype), dual_of(self, member).to(values.dtype)
        for row in self.rows[name]:
            made = []
            for piece in apart(values, row, self.sizes):
                order = _order(self, piece.labels)
                if order is None:
                    made.append(piece.values)
                    continue
                moved = piece.values.permute(order)
                flat = moved.reshape(*moved.shape[: len(self.outer) + 1], -1)
                by = dual if DUAL in piece.labels else m
                flat = by[..., None] * flat if self.kind == "scale" else by @ flat
                back = [order.index(k) for k in range(len(order))]
                made.append(flat.reshape(moved.shape).permute(back))
            whole = tuple(s if t is None else t for t, s in zip(row, values.shape, strict=True))
            values = together(iter(made), whole)
        return values

    def eye(self) -> Tensor:
        """The member that moves nothing."""
        one = torch.ones(self.size, dtype=torch.float64)
        return (one if self.kind == "scale" else torch.diag(one)).expand(self.shape).clone()

    def random(self, generator: torch.Generator) -> Tensor:
        """A member, rotations of any angle, scales and shears of moderate size."""
        drawn = torch.randn(
            *self.outer.values(), self.size, self.size, generator=generator, dtype=torch.float64
        )
        if self.kind == "scale":
            return (0.5 * drawn.diagonal(dim1=-2, dim2=-1)).exp()
        if self.kind == "planes":
            i, j = planes(self)
            angle, scale = 3 * drawn[..., i, i], (0.3 * drawn[..., j, j]).exp()
            return rotation(self, angle) * spread(self, scale)[..., None]
        turn: Tensor = torch.linalg.qr(drawn)[0]
        if self.kind == "centred":
            basis = centred_basis(self.size)
            inner: Tensor = torch.linalg.qr(drawn[..., 1:, 1:])[0]
            return basis @ inner @ basis.mT + 1 / self.size
        if self.kind == "linear":
            sheared: Tensor = torch.matrix_exp(0.3 * drawn.flip(-1) / self.size**0.5)
            return turn @ sheared
        return turn


class Part(NamedTuple):
    values: Tensor
    dual: bool


def dual_of(law: Law, member: Tensor) -> Tensor:
    """M⁻ᵀ."""
    if law.kind == "scale":
        return 1 / member
    return member if law.kind in ("orthogonal", "centred") else torch.linalg.inv(member).mT


def planes(law: Law) -> tuple[Tensor, Tensor]:
    """First and second positions of the pairs."""
    at = torch.arange(law.size // 2)
    return (at, at + law.size // 2) if law.pairs == "halves" else (2 * at, 2 * at + 1)


def rotation(law: Law, angle: Tensor) -> Tensor:
    """Rotations by `angle` `[*outer, pairs]`."""
    i, j = planes(law)
    m = torch.zeros(*angle.shape[:-1], law.size, law.size, dtype=angle.dtype)
    m[..., i, i] = m[..., j, j] = angle.cos()
    m[..., j, i], m[..., i, j] = angle.sin(), -angle.sin()
    return m


def spread(law: Law, values: Tensor) -> Tensor:
    """One value a pair, at both of its positions."""
    i, j = planes(law)
    made = torch.zeros(*values.shape[:-1], law.size, dtype=values.dtype)
    made[..., i] = made[..., j] = values
    return made


def centred_basis(n: int) -> Tensor:
    """Orthonormal columns [n, n − 1], all at right angles to the ones."""
    ones = torch.ones(n, 1, dtype=torch.float64)
    whole: Tensor = torch.linalg.qr(torch.cat([ones, torch.eye(n, dtype=torch.float64)[:, 1:]], 1))[0]
    return whole[:, 1:]


def _order(law: Law, labels: Sequence[Any]) -> list[int] | None:
    """Axes of a piece: the outer groups', the moved one, all others; None where nothing is moved."""
    at = next((k for k, label in enumerate(labels) if label in (X, DUAL)), None)
    if at is None:
        return None
    front = [*(labels.index(o) for o in law.outer), at]
    return [*front, *(k for k in range(len(labels)) if k not in front)]


@dataclass(frozen=True)
class Symmetries:
    """Laws by name; those of gains first."""

    laws: Mapping[str, Law]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def gains(self) -> dict[str, Law]:
        return {n: law for n, law in self.laws.items() if law.gain is not None}

    def __str__(self) -> str:
        lines = []
        for name, law in self.laws.items():
            each = f" for each of {' × '.join(f'{s} {o}' for o, s in law.outer.items())}" if law.outer else ""
            lines.append(
                f"{name}: {law.kind} of {law.size}{each}" + (f", folds {law.gain}" if law.gain else "")
            )
            for tensor, rows in law.rows.items():
                told = "; ".join(", ".join(written(t) or "·" for t in row) for row in rows)
                lines.append(f"    {tensor}: {told}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def random(self, seed: int = 0) -> dict[str, Tensor]:
        """A member of every law; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return {n: law.random(generator) for n, law in self.laws.items()}

    def complete(self, members: Members) -> dict[str, Tensor]:
        """Members of all laws, checked. Problems naming unknown laws and matrices that are none of their kind."""
        problems = []
        for n, m in members.items():
            if n not in self.laws:
                problems.append(f"{n}: there is no such law{did_you_mean(n, self.laws)}")
            elif tuple(m.shape) != self.laws[n].shape:
                problems.append(
                    f"{n}: a member of shape {list(self.laws[n].shape)} is needed, not {list(m.shape)}"
                )
            elif not is_member(self.laws[n], m.double()):
                problems.append(f"{n}: it is not {self.laws[n].kind}")
        if problems:
            raise Problems("these matrices do not fit the symmetries", problems)
        return {n: members[n].double() if n in members else law.eye() for n, law in self.laws.items()}

    def folded(self, model: Any) -> Checkpoint:
        """The model with every gain that can be folded into what reads its norm made 1: computes the same."""
        from weft.checkpoints.load import load

        source = load(model)
        check(source, self.laws.values())
        return Turned(source, [(law, 1 / gain_of(source, law)) for law in self.gains.values()])

    def apply(self, model: Any, members: Members, *, gains: Any = None) -> Checkpoint:
        """The model moved by members of the laws: a lazy checkpoint that computes the same.

        Gains are folded, all other members applied, and the gains of the model (or of `gains`, another model) put
        back, times the members of their own laws.
        """
        from weft.checkpoints.load import load

        source, whole = load(model), self.complete(members)
        like = source if gains is None else load(gains)
        check(like, self.gains.values())
        made = self.folded(source)
        steps = [(law, whole[n]) for n, law in self.laws.items() if law.gain is None and n in members]
        back = [(law, gain_of(like, law) * whole[n]) for n, law in self.gains.items()]
        return Turned(made, [*steps, *back])

    # -- text ----------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """JSON, which `load` reads."""
        laws = {
            n: asdict(law)
            | {"rows": {t: [[written(a) for a in row] for row in rows] for t, rows in law.rows.items()}}
            for n, law in self.laws.items()
        }
        write_whole(Path(path), json.dumps({"laws": laws, "notes": list(self.notes)}, indent=1).encode())

    @classmethod
    def load(cls, path: str | Path) -> Symmetries:
        """Symmetries from a file that `save` wrote and that may have been edited."""
        from weft.checkpoints.strictjson import parse_json

        try:
            data = parse_json(Path(path).read_bytes(), str(path), "config-json", depth=8)
            laws = {}
            for n, told in data["laws"].items():
                rows = {
                    t: tuple(tuple(None if a is None else parsed(str(a)) for a in row) for row in r)
                    for t, r in told["rows"].items()
                }
                laws[n] = Law(**{**told, "rows": rows})
            return cls(laws, tuple(data.get("notes", ())))
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no symmetries: {error!s:.80}") from None


def gain_of(model: Checkpoint, law: Law) -> Tensor:
    """The norm's gain, float64. DataError where it is 0 somewhere, so that it cannot be folded."""
    assert law.gain is not None
    g = model.tensor(law.gain, dtype=torch.float64)
    if not bool(g.isfinite().all() and (g != 0).all()):
        raise DataError(f"{law.gain} of {model.origin} is 0 or not finite somewhere, so it cannot be folded")
    return g


def is_member(law: Law, m: Tensor, tolerance: float = 1e-6) -> bool:
    """Whether a matrix belongs to a law's group."""
    if not bool(m.isfinite().all()):
        return False
    if law.kind == "scale":
        return bool((m != 0).all()) if law.gain else bool((m > 0).all())
    eye = torch.eye(law.size, dtype=m.dtype)
    if law.kind in ("orthogonal", "centred"):
        kept = law.kind == "orthogonal" or float((m.sum(-1) - 1).abs().max()) < tolerance
        return kept and float((m @ m.mT - eye).abs().max()) < tolerance
    if law.kind == "planes":
        i, j = planes(law)
        inside = rotation(law, torch.atan2(m[..., j, i], m[..., i, i]))
        size = (m[..., i, i] ** 2 + m[..., j, i] ** 2).sqrt()
        return float((m - inside * spread(law, size)[..., None]).abs().max()) < tolerance
    return bool((torch.linalg.svdvals(m)[..., -1] > 1e-9).all())


def check(model: Checkpoint, laws: Iterable[Law]) -> None:
    """DataProblems naming every tensor of the laws that a model lacks or has in another shape."""
    problems: dict[str, None] = {}
    for law in laws:
        for name, rows in law.rows.items():
            if name not in model:
                problems[f"{name}: not in {model.origin}"] = None
                continue
            shape = model.info(name).shape
            for row in rows:
                wanted = [size_of(t, law.sizes) for t in row]
                if len(row) != len(shape) or any(
                    w not in (None, s) for w, s in zip(wanted, shape, strict=True)
                ):
                    told = [w or "·" for w in wanted]
                    problems[f"{name}: shape {list(shape)}, where {told} is needed".replace("'", "")] = None
    if problems:
        raise DataProblems(f"{model.origin} does not fit these symmetries", problems)


class Turned(Derived):
    """A checkpoint moved by members of laws, one after the other; a tensor that is moved is read whole."""

    def __init__(self, source: Checkpoint, steps: Sequence[tuple[Law, Tensor]]) -> None:
        super().__init__(source)
        check(source, [law for law, _ in steps])
        self.steps = list(steps)
        self.origin = f"{source.origin} turned"

    def _moves(self, name: str) -> bool:
        return any(name in law.rows for law, _ in self.steps)

    def grain(self, name: str) -> int:
        return max(1, self.info(name).numel) if self._moves(name) else self.first.grain(name)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self._moves(name):
            return self.first.read(name, start, stop, dtype=dtype)
        info = self.info(name)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        wanted = info.dtype if dtype is None else dtype
        wide = torch.float64 if torch.float64 in (info.dtype, dtype) else torch.float32
        values = self.first.read(name, dtype=wide).reshape(info.shape)
        for law, member in self.steps:
            if name in law.rows:
                values = law.turned(name, values, member)
        return values.reshape(-1).to(wanted)[start:stop]

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        self.first.prefetch(name) if self._moves(name) else self.first.prefetch(name, start, stop)

    def working_bytes(self, name: str, count: int) -> int:
        if not self._moves(name):
            return self.first.working_bytes(name, count)
        numel = self.info(name).numel
        return self.first.working_bytes(name, numel) + 4 * 8 * numel

    def identity(self) -> str | None:
        import hashlib

        inner = super().identity()
        if inner is None:
            return None
        told = hashlib.sha256()
        for law, member in self.steps:
            told.update(repr(law).encode() + member.double().contiguous().numpy().tobytes())
        return f"{told.hexdigest()}{inner}"
