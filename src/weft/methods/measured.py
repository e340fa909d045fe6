"""How statistics reach a step: `needs=`, and the checkpoints of statistics that a merge hands on.

Statistics are checkpoints (see weft.statistics): a tensor `"{kind}/{name}"` says something of the parameter
`name`, and `config["weft_statistics"]` says of which model and from how much data. A step declares
`needs=("gram",)` and gets, beside the values, the keyword

- `gram: Tensor [k, *shape of the statistic] | None`, the models' in order; None where no model has one;
- `base_gram: Tensor [*shape of the statistic] | None` for a need named `"base_gram"`: the base's own;
- `fisher_norm: Tensor [k] | None` for `"fisher_norm"`: the L2 norm of that kind over all tensors of the merge;
- `fisher_samples: Tensor [k] | None` for `"fisher_samples"`: how many examples it was measured on.

With a question mark (`"base_gram?"`) it may be absent altogether. Kinds in `ELEMENTWISE` have the weight's shape
and come as the same range as the values, in float64; all others come whole, as they are stored (a Gram matrix in
float32 takes half the memory), for the step to widen as it adds them up. A step declared `one_by_one` gets `Whole`
for them, which reads each model's when it is asked for.

Layouts: a Gram matrix is `[d, d]` over the d inputs of one output (`in·kh·kw` of a convolution), or `[b, d, d]` for
weights made of b blocks (groups, fused experts); of an embedding it is its diagonal `[V]`. `At.transposed` tells
weights stored `[in, out]`. `matrices` and `unmatrices` bring any such weight to `[k, b, out, in]` and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from weft.checkpoints.base import Checkpoint, WeightFile
from weft.checkpoints.execution import execution, ranges, to_device
from weft.errors import DataError, UsageError
from weft.late import Tensor, torch
from weft.methods.fitting import check_fit, check_given
from weft.methods.kinds import ABOUT, ELEMENTWISE, NONNEGATIVE, Need
from weft.methods.stats import fold, tile_sums

if TYPE_CHECKING:
    from weft.methods.merge import Merge
    from weft.methods.step import Step


def about(statistics: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint of statistics says of itself; UsageError if it is none."""
    told = (statistics.config or {}).get(ABOUT)
    if not isinstance(told, Mapping):
        raise UsageError(
            f"{statistics.origin} holds no statistics (its config has no {ABOUT!r}): make some with weft measure"
        )
    return told


def at_hand(
    needs: Iterable[Need], given: Mapping[str, Tensor | None], who: str, view: tuple[int, ...]
) -> dict[str, Any]:
    """The keywords for a step that is called on tensors directly, from what the caller gives by keyword.

    `view` is the shape the step sees of a tensor; a norm is that of the tensor at hand.
    """
    found: dict[str, Any] = {}
    for need in needs:
        if need.source not in given and not need.optional:
            raise UsageError(
                f"{who} needs statistics: pass statistics={{{need.source!r}: …}}, or None where there are none"
            )
        value = given.get(need.source)
        if value is not None and need.norm:
            wide = value.double()
            value = wide.norm() if need.of_base else wide[..., None].flatten(1).norm(dim=1)
        elif value is not None and need.elementwise:
            value = value.reshape(view if need.of_base else (value.shape[0], *view))
        found[need.keyword] = value
    return found


class Whole:
    """One statistic of all models, read a model at a time: as the stack [k, …] that need never be in memory."""

    def __init__(self, held: Sequence[tuple[Checkpoint, str]]) -> None:
        source, key = held[0]
        self._held, self._one = list(held), source.info(key).shape
        self.shape = (len(held), *self._one)

    def __getitem__(self, at: int | tuple[int, int]) -> Tensor:
        """One model's, or one block [d, d] of it."""
        i, block = (at, None) if isinstance(at, int) else at
        source, key = self._held[i]
        size = prod(self._one[1:])
        if block is None or source.grain(key) > size:
            whole = read(source, key).reshape(self._one)
            return whole if block is None else whole[block]
        return read(source, key, block * size, (block + 1) * size).reshape(self._one[1:])


class Measured:
    """The statistics of a merge's models and base, checked against them when made."""

    def __init__(self, merge: Merge, models: Sequence[Checkpoint], base: Checkpoint | None) -> None:
        self.models, self.base = tuple(models), base
        self.all = self.models if base is None else (*self.models, base)
        names = merge.merged_names() if merge.method.needs else []
        self.needs = tuple(dict.fromkeys(n for m in names for n in merge.declared(m).needs))
        self._norms: dict[str, Tensor] = {}
        told = [about(s) for s in self.all]
        self._samples = [t.get("samples") for t in told]
        self._transposed = {str(n) for t in told for n in t.get("transposed", ())}
        self._keys = [_by_parameter(s) for s in self.all]
        self._seen = {n for keys in self._keys for kind, n in keys if kind not in ELEMENTWISE}

    @classmethod
    def of(
        cls, merge: Merge, models: Sequence[Checkpoint] | None, base: Checkpoint | None
    ) -> Measured | None:
        """Statistics for a merge, or None where its method needs none; raises what speaks against them."""
        made = cls(merge, models or (), base)
        check_given(merge, made)
        if not made.needs:
            return None
        check_fit(merge, made)
        return made

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return tuple({f.path: f for s in self.all for f in s.files}.values())

    def identity(self) -> str | None:
        """As of checkpoints: None where it cannot be known."""
        inner = [s.identity() for s in self.all]
        return None if None in inner else f"{inner}"

    def knows(self, name: str) -> bool:
        """Whether there is a statistic of the weight's inputs or outputs, so that how it is stored was seen."""
        return name in self._seen

    def transposed(self, name: str) -> bool:
        """Whether the weight is stored [in, out]."""
        return name in self._transposed

    def asked(self, need: Need, sources: Iterable[int] | None = None) -> list[int]:
        """Positions in `all` of the statistics that should have it; of all models without `sources`."""
        if need.of_base:
            return [] if self.base is None else [len(self.models)]
        return [i for i in (range(len(self.models)) if sources is None else sources) if i < len(self.models)]

    def holders(
        self, need: Need, name: str, sources: Iterable[int] | None = None
    ) -> list[tuple[Checkpoint, str]]:
        """Who has the statistic of a tensor, and under which name."""
        keys = [(self.all[i], self._keys[i].get((need.kind, name))) for i in self.asked(need, sources)]
        return [(s, key) for s, key in keys if key is not None]

    def has(self, i: int, kind: str, name: str) -> bool:
        """Whether statistics number i have a kind of a tensor."""
        return (kind, name) in self._keys[i]

    def unmeasured(self, merge: Merge) -> dict[str, str]:
        """Tensors of which what the method must have was not measured, with the reason."""
        found = {}
        for name in merge.merged_names():
            needs = [n for n in merge.declared(name).needs if not n.optional and n.tensorwise]
            lacking = [n.kind for n in needs if not self.holders(n, name)]
            if lacking:
                found[name] = f"no {' and no '.join(dict.fromkeys(lacking))} measured"
        return found

    def shapes(self, merge: Merge, name: str, needs: Iterable[Need]) -> dict[str, tuple[int, ...]]:
        """Of which of the needs there is a statistic of a tensor, and its shape."""
        sources = merge.part(name).sources
        held = {n.keyword: self.holders(n, name, sources) for n in needs if n.tensorwise}
        return {k: tuple(h[0][0].info(h[0][1]).shape) for k, h in held.items() if h}

    def ready(self, merge: Merge, name: str) -> None:
        """Do what must precede the reads of a tensor's statistics."""
        if any(n.norm and n.keyword not in self._norms for n in self.needs):
            self.survey(merge)
        for source, key in self._read_of(merge, name):
            source.ready(key)

    def survey(self, merge: Merge) -> None:
        """Norms over the whole model, and what the statistics themselves must do first."""
        for source in self.all:
            source.survey()
        for need in self.needs:
            if need.norm and need.keyword not in self._norms:
                norms = [self._norm(need, i, merge.merged_names()) for i in self.asked(need)]
                self._norms[need.keyword] = (
                    torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)
                )

    def _read_of(self, merge: Merge, name: str) -> list[tuple[Checkpoint, str]]:
        """Everything that is read for one tensor, once a step that reads it."""
        sources, steps = merge.part(name).sources, merge.pipeline(name).steps
        needs = [n for b in steps for n in b.step.needs if n.tensorwise]
        return [held for n in needs for held in self.holders(n, name, sources)]

    def bytes_read(self, merge: Merge, name: str) -> int:
        """Stored bytes that the statistics of one tensor take."""
        return sum(s.bytes_read(key) for s, key in self._read_of(merge, name))

    def working_bytes(self, merge: Merge, name: str, count: int) -> int:
        """Memory they take while `count` elements are merged: each as it is stored, and in the stack.

        Of what comes whole, one more and a sum of all in float64: steps widen them one by one. A step that reads
        them one by one counts them itself.
        """
        total = widest = longest = 0
        single = all(b.step.one_by_one for b in merge.pipeline(name).steps if b.step.needs)
        for source, key in self._read_of(merge, name):
            info, elementwise = source.info(key), key.partition("/")[0] in ELEMENTWISE
            n = count if elementwise else info.numel
            inner = source.working_bytes(key, n)
            total += n * (16 if elementwise else 2 * info.dtype.itemsize) + inner
            longest, widest = max(longest, inner), max(widest, 0 if elementwise else n)
        return longest if single else total + 16 * widest

    def keywords(
        self, merge: Merge, name: str, step: Step, start: int, stop: int, view: tuple[int, ...]
    ) -> dict[str, Any]:
        """What a step gets of its needs for elements [start, stop), which it sees in the shape `view`."""
        found: dict[str, Any] = {}
        sources = merge.part(name).sources
        for need in step.needs:
            if need.norm:
                norms = self._norms[need.keyword]  # empty where the merge was given no such statistics
                found[need.keyword] = (
                    None if not len(norms) else norms[0] if need.of_base else norms[list(sources)]
                )
                continue
            if need.samples:
                counts = [self._samples[i] for i in self.asked(need, sources)]
                found[need.keyword] = torch.tensor(counts).double() if None not in counts and counts else None
                continue
            held = self.holders(need, name, sources)
            if held and step.one_by_one and not need.elementwise and not need.of_base:
                found[need.keyword] = Whole(held)
                continue
            if need.kind in ELEMENTWISE:
                values = [read(s, key, start, stop).double().reshape(view) for s, key in held]
            else:
                values = [read(s, key).reshape(s.info(key).shape) for s, key in held]
            found[need.keyword] = None if not values else values[0] if need.of_base else torch.stack(values)
        return found

    def _norm(self, need: Need, i: int, names: Sequence[str]) -> Tensor:
        """L2 norm of one kind over the merged tensors of one model, float64."""
        source, cut = self.all[i], []
        for key in dict.fromkeys(self._keys[i].get((need.kind, n)) for n in names):
            if key is not None:
                found = ranges(source.info(key).numel, source.grain(key), execution().chunk)
                cut += [(key, a, b) for a, b in found]
        parts = execution().map(partial(_squares, source), cut)
        return fold(torch.cat(parts).T)[0].sqrt() if parts else torch.zeros((), dtype=torch.float64)


def _squares(source: Checkpoint, cut: tuple[str, int, int]) -> Tensor:
    return tile_sums(read(source, *cut).double().square()[None]).cpu()


def read(source: Checkpoint, key: str, start: int = 0, stop: int | None = None) -> Tensor:
    """A range of one statistic on the device; DataError where it is not finite, or negative and must not be."""
    values = source.read(key, start, stop)
    kind, _, name = key.partition("/")
    bad = "has NaN or infinite values" if not bool(values.isfinite().all()) else ""
    if kind in NONNEGATIVE:
        shape = source.info(key).shape
        square = kind not in ELEMENTWISE and len(shape) > 1
        checked = values.reshape(-1, *shape[-2:]).diagonal(dim1=-2, dim2=-1) if square else values
        bad = bad or ("is negative, which no measurement gives" if bool((checked < 0).any()) else "")
    if bad:
        raise DataError(f"{source.origin}: the {kind} of {name!r} {bad}: measure it again")
    return to_device(values, execution().device)


def _by_parameter(statistics: Checkpoint) -> dict[tuple[str, str], str]:
    """(kind, parameter) → tensor of statistics; tied parameters share what was measured of one of them."""
    found: dict[tuple[str, str], str] = {}
    told = about(statistics).get("tied", {})
    for key in statistics:
        kind, _, name = key.partition("/")
        found[kind, name] = key
        for alias in (a for a, target in told.items() if target == name):
            found.setdefault((kind, alias), key)
    return found


def maps(x: Tensor, gram: Tensor, transposed: bool = False) -> Tensor:
    """Weights x [k, *shape] as the maps that a stack of Gram matrices [k, (b,) d, d] belongs to: [k, b, out, d]."""
    d, blocks = gram.shape[-1], gram.shape[1] if gram.dim() == 4 else 1
    if transposed:
        return x.reshape(x.shape[0], blocks, d, -1).transpose(-1, -2)
    return x.reshape(x.shape[0], blocks, -1, d)


def matrices(x: Tensor, blocks: int = 1, transposed: bool = False) -> Tensor:
    """Weights as linear maps, x: [k, *shape] → [k, blocks, out, in].

    [out, in, …] is flattened behind its first axis and cut into `blocks` groups of outputs ([E, out, in] with
    blocks = E into its experts). A transposed weight [in, out, …] is cut into groups of inputs.
    """
    k, n = x.shape[0], x.shape[1]
    fused = x.ndim == 4 and blocks == n
    y = x if fused else x.reshape(k, blocks, n // blocks, -1)
    return y.transpose(-1, -2) if transposed else y


def unmatrices(y: Tensor, shape: Sequence[int], transposed: bool = False) -> Tensor:
    """The inverse of `matrices` for one result or a stack: [..., blocks, out, in] → [..., *shape]."""
    return (y.transpose(-1, -2) if transposed else y).reshape(*y.shape[:-3], *shape)
