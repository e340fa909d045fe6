"""CAT Merging: trim from every task vector what disturbs the other tasks. Sun et al., ICML 2025, arXiv:2505.06977.

    linear   min over B of Σ_{i≠k} ‖(I − BBᵀ) τₖ Xᵢ‖² + λ ‖BBᵀ τₖ Xₖ‖²,  BᵀB = I of c columns
             B = the c leading eigenvectors of τₖ (Σ_{i≠k} Gᵢ − λ Gₖ) τₖᵀ;  τₖ ← (I − BBᵀ) τₖ
    scale    τₖ ← 0 in the entries where (Σ_{i≠k} gᵢ − λ gₖ) τₖ² is largest        g: the mean squares of inputs
    shift    τₖ ← 0 in the entries where τₖ² is largest, since a shift is the same for every input
    θ = θ0 + α Σ wₖτₖ

Gᵢ = XᵢᵀXᵢ/n of task i's inputs, so that what τₖ does to its outputs is measured: directions go that the others'
outputs change by more than λ times as much as task k's own. Only what has a positive balance is trimmed. This is
the paper's formula, by task vector. The released code, of which a re-implementation was read, finds one basis for
each disturbed task from all others' vectors, trims these by it one after the other, and restores their norms.
How many directions and entries go, and λ = 5, were chosen on small networks, not read in the paper. Followed by
`fit_inputs` the step is RegMean-CAT.

An expert without a weight takes no part, one that did not change a matrix is only protected. Tables, and matrices
without a Gram matrix, are added up as they are. Directions are constants of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.factors import largest, unit_scale
from weft.methods.gram import workspace
from weft.methods.least_squares import Grams, blocks_of
from weft.methods.measured import unmatrices
from weft.methods.params import Bounds, Fraction, NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.step import At, Bound, Pipeline, Shapes, step


def disturbing(t: Tensor, balance: Tensor, most: int, floor: float = 1e-10) -> Tensor:
    """The `most` leading eigenvectors [m, c] of t A tᵀ whose eigenvalues are positive; t [m, n], A [n, n]."""
    m, n = t.shape
    if m > n:  # in the span of t's columns
        q, r = torch.linalg.qr(t)
        made: Tensor = q @ disturbing(r, balance, most, floor)
        return made
    energy = t @ balance @ t.T
    values, vectors = torch.linalg.eigh((energy + energy.T) / 2)
    kept = (values > floor * largest(values)) & (torch.arange(m, device=t.device) >= m - most)
    found: Tensor = vectors[:, kept]
    return found


def trimmed_maps(t: Sequence[Tensor], read: Callable[[int], Tensor], own: float, most: int) -> list[Tensor]:
    """(I − BₖBₖᵀ) τₖ of k maps [m, n]; `read` gives a task's Gram matrix [n, n], float64, and is asked twice."""
    total = read(0).clone()
    for k in range(1, len(t)):
        total += read(k)
    made = []
    for k, tk in enumerate(t):
        scaled = tk.detach() * unit_scale(largest(tk))
        b = disturbing(scaled, total.sub(read(k), alpha=1 + own), most)
        made.append(tk - b @ (b.T @ tk))
    return made


def trimmed_entries(t: Tensor, energy: Tensor, count: int) -> Tensor:
    """t [d] with its `count` entries of the largest positive energy set to 0."""
    if not count:
        return t
    order = energy.detach().argsort(descending=True, stable=True)[:count]
    order = order[energy[order] > 0]
    return t.index_fill(0, order, 0.0)


def _vectors(x: Tensor, gram: Tensor | None, taking: Sequence[int], own: float, count: int) -> Tensor:
    """Every vector x [k, d] trimmed by the others' inputs [k, d], or by its size without."""
    out = list(x)
    total = None if gram is None else sum(gram[i].to(x) for i in taking)
    for i in taking:
        size = (x[i] * unit_scale(largest(x[i]))).detach().square()
        out[i] = trimmed_entries(x[i], size if total is None or gram is None else (
            size * (total - (1 + own) * gram[i].to(x))), count)  # fmt: skip
    return torch.stack(out)


def to_simpler(params: Mapping[str, Any], at: At, known: Shapes) -> Bound | None:
    """Tables, and what was not measured, pass as they are: element by element."""
    whole = len(known.get("gram", ())) > 1 or (len(at.shape) == 1 and params["entries"] > 0)
    return None if at.numel and whole else Bound(scaled, {"scale": 1.0})


def _workspace(params: Mapping[str, Any], at: At, k: int, known: Shapes) -> int:
    """What the Gram solver takes, and every trimmed vector."""
    return workspace(params, at, k, known) + 8 * k * at.numel


@step(grain="tensor", needs=("gram",), one_by_one=True, simpler=to_simpler, workspace=_workspace)
def trim_conflicts(
    x: Tensor,
    *,
    gram: Any,
    at: At,
    weight: Weight = 1.0,
    own: NonNegative = 5.0,
    directions: Annotated[int, Bounds(0)] = 2,
    entries: Fraction = 0.1,
) -> Tensor:
    """Every task vector without what disturbs the others, x: [k, *shape], gram: [k, (b,) in, in] → [k, *shape].

    own         λ, how much more a task's own outputs count than each other's
    directions  of the outputs of a linear map, trimmed at most of each task vector
    entries     share of a scale's or shift's entries, trimmed at most
    """
    k = x.shape[0]
    taking = [i for i, wi in enumerate(per_model(weight, k)) if wi]
    if at.numel == 0 or len(taking) < 2:
        return x
    if gram is None or len(gram.shape) < 3:
        if len(at.shape) != 1:
            return x
        found = None if gram is None else torch.stack([gram[i] for i in range(k)])
        return _vectors(x, found, taking, own, int(entries * at.numel))
    if not directions:
        return x
    return _maps(x, gram, at, taking, own, directions)


def _maps(x: Tensor, gram: Grams, at: At, taking: Sequence[int], own: float, most: int) -> Tensor:
    """Every map that x holds, trimmed."""
    b, d = gram.shape[1] if len(gram.shape) == 4 else 1, gram.shape[-1]
    stack = blocks_of(x, d, b, at.transposed).double()
    made = [list(s) for s in stack]

    def read(block: int, k: int) -> Tensor:
        i = taking[k]
        return (gram[i, block] if len(gram.shape) == 4 else gram[i]).to(stack)

    for j in range(b):
        found = trimmed_maps([stack[i, j] for i in taking], partial(read, j), own, most)
        for i, t in zip(taking, found, strict=True):
            made[i][j] = t
    return torch.stack([unmatrices(torch.stack(m), at.shape, at.transposed) for m in made]).to(x.dtype)


@method(
    space="deltas",
    paper="Sun et al., CAT Merging, ICML 2025, arXiv:2505.06977",
    needs=("gram",),
    aliases=("cat_merging",),
)
def cat(
    *,
    weight: Weight = 1.0,
    own: NonNegative = 5.0,
    directions: Annotated[int, Bounds(0)] = 2,
    entries: Fraction = 0.1,
    scale: float = 1.0,
) -> Pipeline:
    """Add up task vectors without the directions in which each disturbs the other tasks' outputs.

    Needs `weft measure --what gram` of every model. `own` is the paper's λ; `directions` of a linear map's outputs
    and a share `entries` of norms' scales and of shifts are trimmed at most.
    """
    made = trim_conflicts(weight=weight, own=own, directions=directions, entries=entries)
    return made | weighted_sum(weight=weight) | scaled(scale=scale)
