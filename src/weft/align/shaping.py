"""Rules for operations that move, cut, join and reshape axes without computing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.align.dims import Dim, find
from weft.align.trace import Call, Row, Rule, Trace


def viewed(trace: Trace, row: Row, shape: Sequence[int]) -> list[Dim]:
    """The axes of a tensor in another shape: runs of axes whose sizes multiply to the same are one product."""
    if 0 in shape:
        return [trace.fixed(s, "empty") for s in shape]
    left = [d for d in row if d.size != 1]
    wanted = [s for s in shape if s != 1]
    made: list[Dim] = []
    while left and wanted:
        old, new = [left.pop(0)], [wanted.pop(0)]
        a, b = old[0].size, new[0]
        while a != b:
            if a < b:
                old.append(left.pop(0))
                a *= old[-1].size
            else:
                new.append(wanted.pop(0))
                b *= new[-1]
        made += trace.dims.split(trace.dims.product(old), new)
    rest = iter(made)
    return [trace.dims.new(1) if s == 1 else next(rest) for s in shape]


def view(trace: Trace, call: Call) -> list[list[Dim]]:
    row, shape = trace.row(call["self"]), call.results[0].shape
    if call["self"].numel() != call.results[0].numel():
        trace.fix(row, "its bytes are read as another dtype")
        return [[trace.fixed(s, "bytes read as another dtype") for s in shape]]
    return [viewed(trace, row, shape)]


def same(trace: Trace, call: Call) -> list[Row]:
    return [trace.row(call["self"])] * len(call.results)


def permute(trace: Trace, call: Call) -> list[list[Dim]]:
    row = trace.row(call["self"])
    return [[row[k] for k in call["dims"]]]


def transpose(trace: Trace, call: Call) -> list[list[Dim]]:
    row = list(trace.row(call["self"]))
    if call.name == "t":
        return [row[::-1]]
    i, j = call["dim0"], call["dim1"]
    row[i], row[j] = row[j], row[i]
    return [row]


def expand(trace: Trace, call: Call) -> list[list[Dim]]:
    """Copies along an axis are all the same, so any order of them will do."""
    row, shape = trace.row(call["self"]), call.results[0].shape
    new = len(shape) - len(row)
    return [[
        row[k - new] if k >= new and row[k - new].size == s else trace.dims.new(s) for k, s in enumerate(shape)
    ]]  # fmt: skip


def repeat(trace: Trace, call: Call) -> list[list[Dim]]:
    row, times = list(trace.row(call["self"])), list(call["repeats"])
    row = [trace.dims.new(1) for _ in range(len(times) - len(row))] + row
    return [[d if n == 1 else trace.dims.product([trace.dims.new(n), d]) if n else trace.dims.new(0)
             for d, n in zip(row, times, strict=True)]]  # fmt: skip


def cut(trace: Trace, row: Row, axis: int, start: int, stop: int) -> list[Dim]:
    """Positions `[start, stop)` of one axis; other axes may be other ones in each part of it."""
    if start >= stop:
        return [*row[:axis], trace.dims.new(0), *row[axis + 1 :]]
    part, restrict = trace.dims.segment(row[axis], start, stop)
    return [*map(restrict, row[:axis]), part, *map(restrict, row[axis + 1 :])]


def slice_(trace: Trace, call: Call) -> list[list[Dim]]:
    source: Tensor = call["self"]
    row, axis, step = trace.row(source), call.axis(source), call["step"]
    start, stop, _ = slice(call["start"], call["end"], step).indices(source.shape[axis])
    if step == 1:
        return [cut(trace, row, axis, start, stop)]
    size = source.shape[axis]
    if size % step or start >= step or stop <= size - step + start:
        trace.fix([row[axis]], "every n-th of its units is taken")
        return [[*row[:axis], trace.fixed(call.results[0].shape[axis], "every n-th"), *row[axis + 1 :]]]
    outer, inner = trace.dims.split(row[axis], [size // step, step])
    opened = (*row[:axis], outer, inner, *row[axis + 1 :])
    taken = cut(trace, opened, axis + 1, start, start + 1)
    return [taken[: axis + 1] + taken[axis + 2 :]]


def select(trace: Trace, call: Call) -> list[list[Dim]]:
    source: Tensor = call["self"]
    axis = call.axis(source)
    i = int(call["index"]) % source.shape[axis]
    taken = cut(trace, trace.row(source), axis, i, i + 1)
    return [taken[:axis] + taken[axis + 1 :]]


def split(trace: Trace, call: Call) -> list[list[Dim]]:
    """All of split, chunk and unbind: the results' own sizes say where it was cut."""
    source: Tensor = call["self"]
    axis, at, made = call.axis(source), 0, []
    for part in call.results:
        length = 1 if call.name == "unbind" else part.shape[axis]
        taken = cut(trace, trace.row(source), axis, at, at + length)
        made.append(taken[:axis] + taken[axis + 1 :] if call.name == "unbind" else taken)
        at += length
    return made


def cat(trace: Trace, call: Call) -> list[list[Dim]]:
    parts: list[Tensor] = [t for t in call["tensors"] if t.numel() or t.dim() > 1]
    axis = call.axis(parts[0])
    rows = [trace.row(t) for t in parts]
    for row in rows[1:]:
        trace.tie(rows[0][:axis] + rows[0][axis + 1 :], row[:axis] + row[axis + 1 :])
    joined = trace.dims.chain([r[axis] for r in rows if r[axis].size])
    return [[*rows[0][:axis], joined, *rows[0][axis + 1 :]]]


def stack(trace: Trace, call: Call) -> list[list[Dim]]:
    parts: list[Tensor] = call["tensors"]
    rows = [trace.row(t) for t in parts]
    for row in rows[1:]:
        trace.tie(rows[0], row)
    axis = call.axis(call.results[0])
    made = trace.dims.chain([trace.dims.new(1) for _ in parts])
    return [[*rows[0][:axis], made, *rows[0][axis:]]]


def pad(trace: Trace, call: Call) -> list[list[Dim]]:
    """Constants before and after the units of an axis: all the same, so they may be called one set of units."""
    row = list(trace.row(call["self"]))
    for i, k in zip(range(0, len(call["pad"]), 2), range(len(row) - 1, -1, -1), strict=False):
        before, after = call["pad"][i : i + 2]
        if before < 0 or after < 0:
            trace.fix([row[k]], "cropped by padding")
            row[k] = trace.fixed(call.results[0].shape[k], "cropped by padding")
        elif before or after:
            row[k] = trace.dims.chain(
                [d for d in (trace.dims.new(before), row[k], trace.dims.new(after)) if d.size]
            )
    return [row]


def indexed(trace: Trace, source: Tensor, indices: Sequence[Tensor | None]) -> list[Dim]:
    """The axes of `source[indices]`. Indexed axes are fixed: what an index says would have to change with them."""
    row = list(trace.row(source))
    at = [k for k, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if len(given) == 1 and given[0].dtype != torch.bool:
        literal = _run(trace, given[0])
        if literal is not None:
            start = literal % row[at[0]].size
            return cut(trace, tuple(row), at[0], start, start + given[0].numel())
        return [*row[: at[0]], *_picked(trace, row[at[0]], given[0]), *row[at[0] + 1 :]]
    trace.fix((row[k] for k in at), "taken by index")
    if any(i.dtype == torch.bool for i in given):
        return []
    shape = torch.broadcast_shapes(*(i.shape for i in given))  # type: ignore[no-untyped-call]
    new = [trace.fixed(s, "taken by index") for s in shape]
    rest = [d for k, d in enumerate(row) if k not in at]
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return [*rest[:first], *new, *rest[first:]]


def _run(trace: Trace, index: Tensor) -> int | None:
    """Where a run of neighbours begins that the code itself names, such as `x[:, [-2]]`."""
    if index not in trace.literal or index.dim() != 1 or index.is_meta or not index.numel():
        return None
    values = index.tolist()
    return int(values[0]) if values == list(range(values[0], values[0] + len(values))) else None


def _picked(trace: Trace, d: Dim, index: Tensor) -> list[Dim]:
    trace.fix([d], "taken by index")
    if index.dim() != 1:
        return [trace.fixed(s, "taken by index") for s in index.shape]
    key = (id(index), id(find(d)))
    if key not in trace.picks:
        trace.kept.append(index)
        trace.picks[key] = trace.fixed(len(index), "taken by index")
        trace.picks[key].of = d
    return [trace.picks[key]]


def index(trace: Trace, call: Call) -> list[Iterable[Dim]]:
    source: Tensor = call["self"]
    indices = call["indices"] if call.name == "index" else [*[None] * call.axis(source), call["index"]]
    made = indexed(trace, source, indices)
    if len(made) != call.results[0].dim() or [d.size for d in made] != list(call.results[0].shape):
        trace.fix(trace.row(source), "taken by a mask")  # how many there are depends on the values
        return [[trace.fixed(s, "taken by a mask") for s in call.results[0].shape]]
    return [made]


def index_put(trace: Trace, call: Call) -> list[Row]:
    row, values = trace.row(call["self"]), trace.row(call["values"])
    made = indexed(trace, call["self"], call["indices"])
    if made and len(values) <= len(made):
        trace.together([tuple(made), values], [d.size for d in made])
    else:
        trace.fix([*row, *values], "put by a mask")
    return [row]


def along(trace: Trace, call: Call) -> list[list[Dim]]:
    """Operations in which the order along one axis counts (sort, topk, cumsum, flip, roll)."""
    source: Tensor = call["self"]
    axes = call["dims"] or [call.axis(source)]
    row = list(trace.row(source))
    for k in axes:
        trace.fix([row[k]], f"its order counts ({call.name})")
    return [
        [d if d.size == s else trace.fixed(s, call.name) for d, s in zip(row, r.shape, strict=True)]
        for r in call.results
    ]


def last_two(trace: Trace, call: Call) -> list[Row]:
    row = trace.row(call["self"])
    trace.fix(row[-2:], f"its order counts ({call.name})")
    return [row]


def gather(trace: Trace, call: Call) -> list[Row]:
    """gather and scatter: the axis that indices speak of is fixed, the others are those of the indices."""
    source, where = call["self"], call["index"]
    axis, row, other = call.axis(source), trace.row(source), trace.row(where)
    rows = [row, other] + [trace.row(t) for t in (call["src"],) if isinstance(t, Tensor)]
    for r in rows:
        trace.fix([r[axis]] if r else [], "taken by index")
        for k, d in enumerate(r):
            if k != axis and d.size == row[k].size:
                trace.dims.tie(d, row[k])
            elif k != axis:
                trace.fix([d, row[k]], "taken by index in part")
    return [other if call.name == "gather" else row]


def index_add(trace: Trace, call: Call) -> list[Row]:
    into, source = trace.row(call["self"]), trace.row(call["source"])
    axis = call.axis(call["self"])
    trace.fix([into[axis], source[axis]], "put by index")
    trace.tie(into[:axis] + into[axis + 1 :], source[:axis] + source[axis + 1 :])
    return [into]


def masked_scatter(trace: Trace, call: Call) -> list[Row]:
    """Rows put in the places of a mask that is the same all along the last axis, as images among tokens are."""
    row, source, mask = trace.row(call["self"]), trace.row(call["source"]), call["mask"]
    if mask.dim() and mask.stride(-1) == 0 and source and source[-1].size == row[-1].size:
        trace.fix([*row[:-1], *source[:-1]], "put by a mask")
        trace.dims.tie(row[-1], source[-1])
    else:
        trace.fix([*row, *source], "put by a mask")
    return [row]


def _each(names: str, rule: Callable[..., Any]) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


LOOKING: dict[str, Rule] = {
    **_each("view _unsafe_view reshape _reshape_alias squeeze unsqueeze unflatten", view),
    **_each("alias detach lift_fresh lift_fresh_copy clone contiguous _conj", same),
    **_each("permute", permute), **_each("t transpose", transpose), **_each("expand", expand),
    **_each("slice", slice_), **_each("select", select),
    **_each("split split_with_sizes chunk unbind unsafe_split unsafe_split_with_sizes unsafe_chunk", split),
}  # fmt: skip
"""Only looking at the same values in another shape."""

SHAPING: dict[str, Rule] = {
    **_each("repeat", repeat), **_each("cat", cat), **_each("stack", stack), **_each("constant_pad_nd", pad),
    **_each("index index_select", index), **_each("index_put _index_put_impl", index_put),
    **_each("sort topk cumsum cumprod flip roll argsort logcumsumexp cummax kthvalue", along),
    **_each("tril triu", last_two), **_each("gather scatter scatter_add scatter_reduce", gather),
    **_each("index_add", index_add), **_each("masked_scatter", masked_scatter),
}  # fmt: skip
