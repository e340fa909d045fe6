"""`symmetries`: the bases and scales that a network cannot tell apart, found from its gradients.

A one-parameter group exp(tX) of maps of the weights leaves what a network computes as it is if and only if every
output's gradient is at right angles to its orbit, ⟨∂f/∂θ, Xθ⟩ = 0. For a matrix X that acts along an axis of T the
left side is ⟨X, C⟩ with C = Σ ∂f/∂T · Tᵀ over all other axes, so that a few backward passes tell of every X:

    linear       Σ C − Σ C'ᵀ = 0        C of axes that M moves, C' of those that M⁻ᵀ moves
    scale        its diagonal is 0      orthogonal    Σ C + Σ C' is symmetric
    planes       for pairs (i, j) the sum of the diagonal at i and j, and the antisymmetric entry, are 0

Which axes there are is told by the `PermutationSpec`; which of them go together, and on which side, by the signs
that make the diagonals sum to 0. It is asked at weights moved off their own, where nothing holds by chance, in
float64, and what is found is tried: a law under a random member of which the outputs change is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.align.discovery import Inputs, _call, _logits, discover, plain
from weft.align.laws import DUAL, PAIRS, Law, Pairs, Symmetries, X, planes
from weft.align.spec import Axis, PermutationSpec
from weft.align.terms import Chain, Product, Term, product
from weft.align.units import without
from weft.errors import DataError

ROUNDING = 1e-5
"""Of what would be there if nothing cancelled: float64 leaves 1e-12 of it, norms that compute in float32 1e-7."""
KEPT = 1e-5
"""How much of the largest output a member may change it, in float64."""
State = dict[str, Tensor]
Row = tuple[Axis, ...]


@dataclass(frozen=True)
class Slot:
    """A place where a law may act: in one tensor, along one axis, at one leaf of its term."""

    tensor: str
    row: Row
    """The tensor's axes, "x" in the place."""

    def dual(self) -> Row:
        return tuple(_renamed(t) for t in self.row)


@dataclass(frozen=True)
class Candidate:
    """Places of one size that may belong together, for each unit of `outer`."""

    name: str
    size: int
    outer: Mapping[str, int]
    slots: tuple[Slot, ...]
    fixed: bool


def symmetries(
    module: nn.Module, example_inputs: Inputs = None, *, spec: PermutationSpec | None = None,
    outputs: Callable[[Any], Any] | None = None, probes: int = 3, seed: int = 0,
) -> Symmetries:  # fmt: skip
    """The laws under which `module` computes the same, beyond permutations; none that is not exact.

    `spec`: its permutations, else discovered with `example_inputs`. The network is run in float64 on a copy whose
    weights are shaken, `probes` times backwards, twice. Laws of gains come first, then those of heads and hidden
    units, then rotations of residual streams, which hold with gains folded.
    """
    spec = discover(module, example_inputs, outputs=outputs) if spec is None else spec
    probe = _Probe(module, example_inputs, outputs, probes, seed)
    state = probe.shaken()
    slopes = probe.gradients(state)
    sizes = {n: g.size for n, g in spec.groups.items()}
    laws: dict[str, Law] = {}
    whole: set[str] = set()
    for candidate in _candidates(spec, state, sizes):
        for law in _cancelling(candidate, state, slopes):
            laws[_free(law.gain or candidate.name, laws)] = law
            if law.kind == "linear":
                whole.add(candidate.name)
    gains = {n: law for n, law in laws.items() if law.gain is not None}
    laws = gains | {n: law for n, law in laws.items() if n not in gains}
    flat = dict(state)
    for law in gains.values():
        by = 1 / flat[law.gain or ""]
        flat |= {n: law.turned(n, flat[n], by) for n in law.rows}
    slopes = probe.gradients(flat)
    known = {law.gain for law in gains.values()}
    for candidate in _candidates(spec, flat, sizes):
        if candidate.fixed or candidate.outer or candidate.name in whole:
            continue
        kept = replace(candidate, slots=tuple(s for s in candidate.slots if s.tensor not in known))
        found = _rotating(kept, flat, slopes)
        if found is not None:
            laws[_free(candidate.name, laws)] = found
    return probe.held(Symmetries(laws, spec.notes), state)


class _Probe:
    """A network's outputs' gradients, in float64, at weights that are given."""

    def __init__(
        self, module: nn.Module, inputs: Inputs, outputs: Callable[[Any], Any] | None, probes: int, seed: int
    ) -> None:
        args, kwargs = _call(module, inputs)
        self.module = deepcopy(module).double().requires_grad_(False)
        self.args, self.kwargs = pytree.tree_map_only(Tensor, _wide, (args, kwargs))
        self.pick, self.probes = outputs or _logits, probes
        self.generator = torch.Generator().manual_seed(seed)

    def shaken(self) -> State:
        """The parameters, tied ones once, moved by half of their size and a little."""
        if any(p.is_meta for p in self.module.parameters()):
            raise DataError(
                "rotations and scales are found from gradients: give a network with weights, not on meta"
            )
        return {
            n: p.detach() + (0.5 * p.detach().std(correction=0) + 0.1) * self._normal(p.shape)
            for n, p in self.module.named_parameters()
        }

    def gradients(self, state: State) -> list[State]:
        """Of `probes` random sums of the outputs."""
        free = {n: t.detach().requires_grad_() for n, t in state.items()}
        found = []
        with plain(self.module):
            result = torch.func.functional_call(self.module, free, self.args, self.kwargs)
            outs = [
                t for t in pytree.tree_leaves(self.pick(result)) if isinstance(t, Tensor) and t.requires_grad
            ]
            if not outs:
                raise DataError("no output of the network depends on its weights")
            for k in range(self.probes):
                total = torch.stack([(t * self._normal(t.shape)).sum() for t in outs]).sum()
                slopes = torch.autograd.grad(
                    total, list(free.values()), retain_graph=k + 1 < self.probes, allow_unused=True
                )
                found.append(
                    {
                        n: torch.zeros_like(t) if s is None else s
                        for (n, t), s in zip(free.items(), slopes, strict=True)
                    }
                )
        return found

    def held(self, found: Symmetries, state: State) -> Symmetries:
        """Only the laws that a random member of keeps the outputs: what gradients at one place say, once more."""
        drawn, before = found.random(1), self.outputs(state)
        most = max((float(t.abs().max()) for t in before), default=0.0)

        def change(names: Iterable[str]) -> float:
            moved = found.apply(state, {n: drawn[n] for n in names}).state_dict()
            return max(float((a - b).abs().max()) for a, b in zip(before, self.outputs(moved), strict=True))

        if change(found.laws) <= KEPT * most:
            return found
        wrong = [n for n in found.laws if change([n]) > KEPT * most]
        notes = tuple(f"{n}: it seemed a law, but the outputs change" for n in wrong)
        kept = {n: law for n, law in found.laws.items() if n not in wrong}
        return Symmetries(kept, (*found.notes, *notes))

    def outputs(self, state: State) -> list[Tensor]:
        with plain(self.module), torch.no_grad():
            result = torch.func.functional_call(self.module, state, self.args, self.kwargs)
        return [
            t
            for t in pytree.tree_leaves(self.pick(result))
            if isinstance(t, Tensor) and t.is_floating_point()
        ]

    def _normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


# -- where laws may act -------------------------------------------------------------------------------


def _candidates(spec: PermutationSpec, state: State, sizes: Mapping[str, int]) -> list[Candidate]:
    """Groups of the specification, and runs of one length within the same heads."""
    found: dict[tuple[str, int, tuple[str, ...]], list[Slot]] = {}
    for name, row in spec.axes.items():
        if name not in state:
            continue
        for axis, term in enumerate(row):
            for label, before, put in _leaves(term):
                if isinstance(label, int):
                    outer = before[:1]
                    if label < 2 or not outer:
                        continue
                    key = ("", label, outer)
                else:
                    key = (label, sizes[label], spec.groups[label].within)
                slot = _slot(spec, state[name], row, axis, put, key[2], sizes)
                found.setdefault(key, []).append(Slot(name, slot))
    made = []
    for (label, size, outer), slots in found.items():
        if size > 1 and not any(
            label in g.within for g in spec.groups.values()
        ):  # heads: a part of what is in them
            called = label or f"{slots[0].tensor.removesuffix('.weight')}, planes"
            made.append(Candidate(called, size, {o: sizes[o] for o in outer}, tuple(slots), not label))
    return made


def _leaves(term: Axis) -> Iterator[tuple[str | int, tuple[str, ...], Callable[[str], Term]]]:
    """Each leaf of a term, the groups before it in its product, and the term with another in its place."""
    if isinstance(term, str | int):
        yield term, (), lambda x: x
    elif isinstance(term, Product):
        for i, factor in enumerate(term.factors):
            held = tuple(f for f in term.factors[:i] if isinstance(f, str))
            for label, before, put in _leaves(factor):
                yield (label, held + before,
                       lambda x, i=i, put=put, t=term: Product((*t.factors[:i], put(x), *t.factors[i + 1 :])))  # type: ignore[misc]  # fmt: skip
    elif isinstance(term, Chain):
        for i, part in enumerate(term.parts):
            for label, before, put in _leaves(part):
                yield (label, before,
                       lambda x, i=i, put=put, t=term: Chain((*t.parts[:i], put(x), *t.parts[i + 1 :])))  # type: ignore[misc]  # fmt: skip


def _slot(
    spec: PermutationSpec, tensor: Tensor, row: tuple[Axis, ...], axis: int, put: Callable[[str], Term],
    outer: tuple[str, ...], sizes: Mapping[str, int],
) -> tuple[Axis, ...]:  # fmt: skip
    """A row with "x" in one place, and of all groups only the outer ones."""
    kept, known = frozenset((X, *outer)), {**sizes, X: 0}
    made: list[Axis] = []
    for k, term in enumerate(row):
        if k == axis:
            made.append(without(put(X), kept, known))
        elif k < axis and outer:
            made.append(None if term is None else without(term, kept, known))
        else:
            made.append(None)
    return tuple(made)


def _renamed(term: Axis) -> Axis:
    if term == X:
        return DUAL
    if isinstance(term, Product):
        return product([_renamed(f) or 1 for f in term.factors])
    if isinstance(term, Chain):
        return Chain(tuple(_renamed(p) or 1 for p in term.parts))
    return term


# -- what cancels -------------------------------------------------------------------------------------


def _moment(candidate: Candidate, slot: Slot, state: State, slope: State) -> Tensor:
    """C = Σ ∂f/∂T Tᵀ over all else: `[*outer, n, n]`."""
    law = Law("linear", candidate.size, candidate.outer, {slot.tensor: (slot.row,)})
    parts = zip(
        law.parts(slot.tensor, slope[slot.tensor]), law.parts(slot.tensor, state[slot.tensor]), strict=True
    )
    return torch.stack([g.values @ t.values.mT for g, t in parts]).sum(0)


def _cancelling(candidate: Candidate, state: State, slopes: list[State]) -> Iterator[Law]:
    """Laws with two sides: places whose diagonals sum to 0 with signs."""
    moments = [torch.stack([_moment(candidate, s, state, g) for g in slopes]) for s in candidate.slots]
    diagonals = [m.diagonal(dim1=-2, dim2=-1) for m in moments]
    ways: list[tuple[Pairs | None, Tensor]] = []
    if not candidate.fixed:
        ways.append((None, torch.stack([d.flatten() for d in diagonals], 1)))
    elif candidate.size % 2 == 0:
        for way in PAIRS:
            i, j = planes(Law("planes", candidate.size, {}, {}, way))
            ways.append((way, torch.stack([(d[..., i] + d[..., j]).flatten() for d in diagonals], 1)))
    for pairs, columns in ways:
        taken: set[int] = set()
        for first in range(len(candidate.slots)):
            if first in taken:
                continue
            signs = _signs(columns, first)
            if signs is None:
                continue
            if all(len(candidate.slots[k].row) == 1 for k, s in signs.items() if s < 0):
                signs = {
                    k: -s for k, s in signs.items()
                }  # what norms read stands on the other side of their gains
            law = _law(candidate, signs, moments, pairs)
            if law is not None:
                taken |= set(signs)
                yield law
        if taken:
            return


def _signs(columns: Tensor, first: int) -> dict[int, int] | None:
    """Signs with which this column and some others sum to 0, the fewest that do; None where there are none."""
    size = columns.norm(dim=0)
    others = [k for k in range(columns.shape[1]) if k != first and size[k] > 0]
    if not others or size[first] == 0:
        return None
    solved = torch.linalg.lstsq(columns[:, others], -columns[:, first, None], driver="gelsd").solution[:, 0]
    signs = {first: 1} | {k: int(s) for k, s in zip(others, solved.round().tolist(), strict=True) if s}
    if any(abs(s) != 1 for s in signs.values()) or -1 not in signs.values():
        return None
    left = sum(s * columns[:, k] for k, s in signs.items())
    return signs if float(torch.as_tensor(left).norm()) < ROUNDING * float(size[list(signs)].sum()) else None


def _law(
    candidate: Candidate, signs: Mapping[int, int], moments: list[Tensor], pairs: Pairs | None
) -> Law | None:
    """The largest group that these places belong to."""
    places = [candidate.slots[k] for k in sorted(signs)]
    rows = _rows(
        (p.tensor, p.row if signs[k] > 0 else p.dual()) for k, p in zip(sorted(signs), places, strict=True)
    )
    scale = torch.stack([moments[k].norm() for k in signs]).sum()
    both = torch.stack([m if (m := moments[k], s)[1] > 0 else -m.mT for k, s in signs.items()]).sum(0)
    if candidate.fixed:
        law = Law("planes", candidate.size, candidate.outer, rows, pairs)
        i, j = planes(law)
        turn = both[..., i, j] - both[..., j, i]
        return law if float(turn.norm()) <= ROUNDING * float(scale) else None
    if float(both.norm()) <= ROUNDING * float(scale):
        return Law("linear", candidate.size, candidate.outer, rows)
    moved = [candidate.slots[k] for k, s in signs.items() if s > 0]
    norm = not candidate.outer and all(len(s.row) == 1 for s in moved)
    gain = candidate.slots[min(k for k, s in signs.items() if s > 0)].tensor if norm else None
    return Law("scale", candidate.size, candidate.outer, rows, gain=gain)


def _rows(found: Iterable[tuple[str, Row]]) -> dict[str, tuple[Row, ...]]:
    made: dict[str, tuple[Row, ...]] = {}
    for tensor, row in found:
        made[tensor] = (*made.get(tensor, ()), row)
    return made


def _rotating(candidate: Candidate, state: State, slopes: list[State]) -> Law | None:
    """The law of rotations along a residual stream: all of them, or those that keep the ones."""
    moments = torch.stack([sum(_moment(candidate, s, state, g) for s in candidate.slots) for g in slopes])  # type: ignore[misc]
    scale = torch.stack([_moment(candidate, s, state, slopes[0]).norm() for s in candidate.slots]).sum()
    turn = moments - moments.mT
    rows = _rows((s.tensor, s.row) for s in candidate.slots)
    if float(turn.norm()) <= ROUNDING * float(scale):
        return Law("orthogonal", candidate.size, {}, rows)
    inside = turn - turn.mean(-1, keepdim=True)
    inside = inside - inside.mean(-2, keepdim=True)
    if candidate.size > 2 and float(inside.norm()) <= ROUNDING * float(scale):
        return Law("centred", candidate.size, {}, rows)
    return None


def _free(name: str, taken: Mapping[str, Law]) -> str:
    n, made = 1, name
    while made in taken:
        n += 1
        made = f"{name}/{n}"
    return made
