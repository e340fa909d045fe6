"""Matching by laws: the member of each that brings b nearest to a, in turn with permutations (`rotation_matching`).

For one law with P = Σ BBᵀ, S = Σ ABᵀ over what M moves and Q, T the same over what D = M⁻ᵀ moves, all n × n,

    f(M) = Σ ‖A − MB‖² + Σ ‖A' − DB'‖² = ⟨MP, M⟩ − 2⟨M, S⟩ + ⟨DQ, D⟩ − 2⟨D, T⟩ + const

is least for an orthogonal M at UVᵀ, of the singular vectors of S + T (Procrustes). For others it is brought down
from there by M ← exp(X) M, with X the least-squares step, X P + Q X = S − P − (T − Q)ᵀ at the current M, solved in
the eigenvectors of P and Q (Sylvester's equation); of scales and planes X has only the entries that these have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.align.apply import reordered
from weft.align.discovery import Inputs
from weft.align.laws import (
    Law,
    Members,
    Symmetries,
    Turned,
    centred_basis,
    dual_of,
    gain_of,
    planes,
    rotation,
    spread,
)
from weft.align.lie import symmetries as found_in
from weft.align.pair import Pair
from weft.align.spec import PermutationSpec
from weft.align.weights import weight_matching
from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError

State = dict[str, Tensor]
Step = tuple[str, Mapping[str, Tensor]]
SLACK = 1e-6
"""A gain of a smaller share of the distance is none."""
Progress = Callable[[int, str, float], None]
"""`progress(round, "turned" or "permuted", distance)`."""


def rotation_matching(
    spec: PermutationSpec, a: Any, b: Any, *, module: nn.Module | None = None, example_inputs: Inputs = None,
    symmetries: Symmetries | str | Path | None = None, permute: bool = True, rounds: int = 10,
    sweeps: int = 20, seed: int = 0, progress: Progress | None = None,
) -> Checkpoint:  # fmt: skip
    """b turned and permuted to be near a, as a lazy checkpoint that computes what b computes.

    `symmetries`: the laws or their file, else found in `module` (or in the transformers model that `a` is).
    Where gains can be folded they are for the matching, and the result has the gains of a. Members and permutations
    are found in turn until neither brings the models nearer, once beginning with each; the nearer end counts. The
    models are held in memory.

    Raises UsageError where there is no network to be run, DataProblems where the models do not fit.
    """
    from weft.checkpoints.load import load

    if rounds < 1 or sweeps < 1:
        raise UsageError(f"rounds and sweeps must be at least 1, not {rounds} and {sweeps}")
    first, second = load(a), load(b)
    pair = Pair(spec, first, second)
    if isinstance(symmetries, str | Path):
        symmetries = Symmetries.load(symmetries)
    laws = _laws(first, module, example_inputs, spec) if symmetries is None else symmetries
    left, right = (_state(laws.folded(m), pair) for m in (first, second))
    best: tuple[float, list[Step]] | None = None
    for turn_first in (True, False) if permute else (True,):
        steps: list[Step] = []
        state, far = right, distance(left, right)
        for k in range(2 * rounds):
            if (k % 2 == 0) == turn_first:
                members = turning(laws, left, state, sweeps)
                steps.append(("turned", members))
                state = moved(laws, state, members)
            elif permute:
                order = weight_matching(spec, left, state, seed=seed)
                steps.append(("permuted", order))
                state = reordered(state, spec, order)
            else:
                continue
            near = distance(left, state)
            if progress is not None:
                progress(k // 2, steps[-1][0], near)
            if k % 2 and near > (1 - SLACK) * far:
                break
            far = near if k % 2 or not permute else far
        reached = distance(left, state)
        if best is None or reached < best[0]:
            best = reached, steps
    assert best is not None
    made: Checkpoint = laws.folded(second)
    for what, found in best[1]:
        made = Turned(made, _steps(laws, found)) if what == "turned" else spec.apply(made, found)
    return Turned(made, [(law, gain_of(first, law)) for law in laws.gains.values()])


def turning(laws: Symmetries, a: State, b: State, sweeps: int = 20) -> dict[str, Tensor]:
    """Members of all laws but those of gains that bring b near a, both with gains folded; one law at a time."""
    found = {n: law.eye() for n, law in laws.laws.items() if law.gain is None}
    state, far = dict(b), distance(a, b)
    for _ in range(sweeps):
        for n in found:
            law = laws.laws[n]
            member = fitted(law, a, state)
            found[n] = member * found[n] if law.kind == "scale" else member @ found[n]
            state |= {t: law.turned(t, state[t], member) for t in law.rows}
        near = distance(a, state)
        if near > (1 - SLACK) * far:
            break
        far = near
    return found


def moved(laws: Symmetries, state: State, members: Members) -> State:
    """A state in memory with gains folded, moved."""
    made = dict(state)
    for law, member in _steps(laws, members):
        made |= {t: law.turned(t, made[t], member) for t in law.rows}
    return made


def distance(a: State, b: State) -> float:
    """‖θA − θB‖²."""
    return float(sum((a[n] - t).double().pow(2).sum() for n, t in b.items()))


def _steps(laws: Symmetries, members: Members) -> list[tuple[Law, Tensor]]:
    return [(laws.laws[n], m) for n, m in members.items()]


def _state(model: Checkpoint, pair: Pair) -> State:
    return {n: pair.finite(model.tensor(n, dtype=pair.dtype(n)), n, model) for n in pair.names}


def _laws(a: Checkpoint, module: nn.Module | None, inputs: Inputs, spec: PermutationSpec) -> Symmetries:
    if module is None:
        if a.config is None:
            raise UsageError(
                f"how='rotations' runs the network to find its laws: give module=, that of {a.origin}"
            )
        from weft.llm.hf import to_transformers

        module = to_transformers(a)
    return found_in(module, inputs, spec=spec)


# -- one law ------------------------------------------------------------------------------------------


def fitted(law: Law, a: State, b: State) -> Tensor:
    """The member that brings b nearest to a, all else held."""
    n, outer = law.size, tuple(law.outer.values())
    p, s, q, t = (torch.zeros(*outer, n, n, dtype=torch.float64) for _ in range(4))
    for name in law.rows:
        for x, y in zip(law.parts(name, a[name]), law.parts(name, b[name]), strict=True):
            left, right = x.values.double(), y.values.double()
            for gram, cross in [(q, t) if y.dual else (p, s)]:
                gram += right @ right.mT
                cross += left @ right.mT
    if law.kind == "orthogonal":
        return _polar(s + t)
    if law.kind == "centred":
        basis = centred_basis(n)
        return basis @ _polar(basis.mT @ (s + t) @ basis) @ basis.mT + 1 / n
    best = law.eye()
    for start in (law.eye(), _turned_start(law, s + t)):
        m = _descended(law, start, p, s, q, t)
        better = _cost(law, m, p, s, q, t) < _cost(law, best, p, s, q, t)
        best = torch.where(_like(better, best), m, best)
    return best


def _polar(m: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(m)
    made: Tensor = u @ v
    return made


def _turned_start(law: Law, cross: Tensor) -> Tensor:
    """The best rotation of the law's kind."""
    if law.kind == "linear":
        return _polar(cross)
    if law.kind == "scale":
        return law.eye()
    i, j = planes(law)
    return rotation(
        law, torch.atan2(cross[..., j, i] - cross[..., i, j], cross[..., i, i] + cross[..., j, j])
    )


def _descended(law: Law, m: Tensor, p: Tensor, s: Tensor, q: Tensor, t: Tensor, steps: int = 8) -> Tensor:
    """f brought down from m by least-squares steps, each head by itself; a step that raises it is halved."""
    cost = _cost(law, m, p, s, q, t)
    for _ in range(steps):
        x = _step(law, m, p, s, q, t)
        share = 1 / x.flatten(cost.dim()).norm(dim=-1).clamp(min=1.0)  # no further than exp is like a line
        for _ in range(12):
            tried = _after(law, m, _like(share, x) * x)
            new = _cost(law, tried, p, s, q, t)
            if bool((new <= cost).all()):
                break
            share = torch.where(new <= cost, share, share / 2)
        good = new <= cost
        m = torch.where(_like(good, m), tried, m)
        gained, cost = cost - torch.where(good, new, cost), torch.where(good, new, cost)
        if bool((gained <= 1e-9 * (p.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-300)).all()):
            break
    return m


def _cost(law: Law, m: Tensor, p: Tensor, s: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """f of each head, but for a constant."""
    if law.kind == "scale":
        one, other, cross, also = (x.diagonal(dim1=-2, dim2=-1) for x in (p, q, s, t))
        return (m * m * one - 2 * m * cross + other / (m * m) - 2 * also / m).sum(-1)
    d = dual_of(law, m)
    return ((m @ p) * m - 2 * m * s + (d @ q) * d - 2 * d * t).sum((-2, -1))


def _step(law: Law, m: Tensor, p: Tensor, s: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """X at the current m; of scales its diagonal."""
    if law.kind == "scale":
        one, other, cross, also = (x.diagonal(dim1=-2, dim2=-1) for x in (p, q, s, t))
        one, other, cross, also = one * m * m, other / (m * m), cross * m, also / m
        return (cross - one - also + other) / (one + other).clamp(min=1e-300)
    d = dual_of(law, m)
    p, q, s, t = m @ p @ m.mT, d @ q @ d.mT, s @ m.mT, t @ d.mT
    right = s - p - (t - q).mT
    if law.kind == "planes":
        i, j = planes(law)
        weight = sum(x.diagonal(dim1=-2, dim2=-1)[..., k] for x in (p, q) for k in (i, j))
        grown = spread(law, (right[..., i, i] + right[..., j, j]) / weight)
        angle = (right[..., j, i] - right[..., i, j]) / weight
        x = torch.diag_embed(grown)
        x[..., j, i], x[..., i, j] = angle, -angle
        return x
    (p_values, u), (q_values, v) = torch.linalg.eigh(p), torch.linalg.eigh(q)
    below = q_values[..., :, None] + p_values[..., None, :]
    damped = below + 1e-6 * float(below.max()) + 1e-300  # units that little reads or writes stay as they are
    inner: Tensor = (v.mT @ right @ u) / damped
    made: Tensor = v @ inner @ u.mT
    return made


def _after(law: Law, m: Tensor, x: Tensor) -> Tensor:
    return x.clamp(-2, 2).exp() * m if law.kind == "scale" else torch.matrix_exp(x) @ m


def _like(values: Tensor, m: Tensor) -> Tensor:
    """One value a head, to be broadcast over a member."""
    return values.reshape(*values.shape, *[1] * (m.dim() - values.dim()))
