"""Rules for operations that compute: element by element, sums of products, convolutions, norms, reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.align.dims import Dim
from weft.align.shaping import LOOKING, SHAPING
from weft.align.trace import Call, Row, Rule, Trace


def _named(text: str) -> frozenset[str]:
    return frozenset(text.split())


UNIFORM = _named(
    "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "scalar_tensor empty_strided new_empty_strided fill zero"
)
"""Makers of tensors whose values are all the same, whatever the order."""
ELEMENTWISE = _named(
    "_to_copy copy masked_fill fill zero rsub where dropout native_dropout threshold nan_to_num hardtanh "
    "floor_divide remainder softplus celu prelu _prelu_kernel log_sigmoid_forward glu_jvp to"
)
REDUCING = _named(
    "sum mean var std var_mean std_mean amax amin prod any all logsumexp linalg_vector_norm norm max min argmax "
    "argmin count_nonzero nansum"
)
POOLING = _named(
    "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices _adaptive_avg_pool2d "
    "_adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa mkldnn_max_pool2d"
)


def elementwise(trace: Trace, call: Call) -> list[Row]:
    result = call.results[0]
    return [trace.together((trace.row(t) for t in call.tensors), result.shape)] * len(call.results)


def uniform(trace: Trace, call: Call) -> list[list[Dim]]:
    return [[trace.dims.new(s) for s in r.shape] for r in call.results]


def unknown(trace: Trace, call: Call) -> list[list[Dim]]:
    """Nothing is known of it, so nothing moves."""
    for t in call.tensors:
        trace.fix(trace.row(t), f"no rule for {call.name}")
        if t.dim():
            trace.notes[
                f"no rule is known for the operation {call.name}: the axes it meets are left alone"
            ] = None
    return [[trace.fixed(s, f"made by {call.name}") for s in r.shape] for r in call.results]


def product(trace: Trace, call: Call) -> list[Row]:
    """mm, bmm, mv, dot and the forms that add: the inner axes are tied."""
    if call.name in ("addmm", "baddbmm", "addmv", "addbmm"):
        pairs = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}
        a, b = (trace.row(call[n]) for n in pairs[call.name])
        extra = [trace.row(call["self"])]
    else:
        second = next(n for n in ("mat2", "vec", "tensor", "other") if isinstance(call[n], Tensor))
        a, b, extra = trace.row(call["self"]), trace.row(call[second]), []
    if len(a) == 3:
        trace.dims.tie(a[0], b[0])
        trace.dims.tie(a[2], b[1])
        made: Row = (a[0], a[1], b[2])
    else:
        trace.dims.tie(a[-1], b[0])
        made = (*a[:-1], *b[1:])
    return [trace.together([made, *extra], call.results[0].shape)]


def linear(trace: Trace, call: Call) -> list[Row]:
    x, w = trace.row(call["input"]), trace.row(call["weight"])
    trace.dims.tie(x[-1], w[1])
    if isinstance(call["bias"], Tensor):
        trace.dims.tie(trace.row(call["bias"])[0], w[0])
    return [(*x[:-1], w[0])]


def embedding(trace: Trace, call: Call) -> list[Row]:
    table = trace.row(call["weight"])
    trace.fix(table[:1], "its rows are looked up by number")
    return [(*trace.row(call["indices"]), *table[1:])]


def convolution(trace: Trace, call: Call) -> list[Row]:
    """weight [out, in / groups, …] (transposed: [in, out / groups, …]); positions are left alone."""
    x, w, groups = trace.row(call["input"]), trace.row(call["weight"]), int(call["groups"])
    shape = call.results[0].shape
    trace.fix((*w[2:], *x[2:]), "positions of a convolution")
    whole, each, enter = (x[1], w[1], w[0])
    if call["transposed"]:
        g_in, _ = trace.dims.split(w[0], [groups, w[0].size // groups])
        trace.dims.tie(x[1], w[0])
        made = trace.dims.product([g_in, w[1]])
    else:
        g_in, inner = trace.dims.split(whole, [groups, whole.size // groups])
        g_out, _ = trace.dims.split(enter, [groups, enter.size // groups])
        trace.dims.tie(g_in, g_out)
        trace.dims.tie(inner, each)
        made = enter
    if isinstance(call["bias"], Tensor):
        trace.dims.tie(trace.row(call["bias"])[0], made)
    return [(x[0], made, *(trace.fixed(s, "positions of a convolution") for s in shape[2:]))]


def layer_norm(trace: Trace, call: Call) -> list[Row]:
    """Over the last axes; their order makes no difference to mean and variance."""
    x = trace.row(call["input"])
    n = len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if isinstance(call[name], Tensor):
            trace.tie(x[-n:], trace.row(call[name]))
    left = len(x) - n
    few: Row = (*x[:left], *(trace.dims.new(1) for _ in range(n)))
    return [x if i == 0 else few for i in range(len(call.results))]


def batch_norm(trace: Trace, call: Call) -> list[Row]:
    x = trace.row(call["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(call[name], Tensor):
            trace.dims.tie(x[1], trace.row(call[name])[0])
    return [
        x if i == 0 else tuple(x[1] if s == x[1].size else trace.dims.new(s) for s in r.shape)
        for i, r in enumerate(call.results)
    ]


def group_norm(trace: Trace, call: Call) -> list[Row]:
    """Channels [groups × in a group]: both may change places, not across groups."""
    x = trace.row(call["input"])
    groups = int(call["group"])
    parts = trace.dims.split(x[1], [groups, x[1].size // groups])
    for name in ("weight", "bias"):
        if isinstance(call[name], Tensor):
            trace.dims.tie(x[1], trace.row(call[name])[0])
    return [x if i == 0 else (x[0], parts[0]) for i in range(len(call.results))]


def softmax(trace: Trace, call: Call) -> list[Row]:
    return [trace.row(call["self"])]


def reducing(trace: Trace, call: Call) -> list[list[Dim]]:
    """Over axes, whose order makes no difference; but positions of extremes are told by number."""
    source: Tensor = call["self"]
    row, given = trace.row(source), call["dim"]
    dims = range(source.dim()) if given in (None, []) else [given] if isinstance(given, int) else given
    axes = {int(k) % max(1, source.dim()) for k in dims}
    if isinstance(call["other"], Tensor):  # the larger of two tensors
        return [list(r) for r in elementwise(trace, call)]
    if call.name.startswith("arg") or (call.name in ("max", "min") and len(call.results) > 1):
        trace.fix((row[k] for k in axes), "its units are told by number")
    if call["keepdim"]:
        made = [trace.dims.new(1) if k in axes else d for k, d in enumerate(row)]
    else:
        made = [d for k, d in enumerate(row) if k not in axes]
    return [made for _ in call.results]


def pooling(trace: Trace, call: Call) -> list[list[Dim]]:
    """Positions only; examples and channels stay apart."""
    row = trace.row(call["input"] if isinstance(call["input"], Tensor) else call["self"])
    spatial = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    trace.fix(row[-spatial:], "positions that are pooled")
    return [
        [*row[:-spatial], *(trace.fixed(s, "positions that are pooled") for s in r.shape[-spatial:])]
        for r in call.results
    ]


def weight_norm(trace: Trace, call: Call) -> list[Row]:
    """w = g v / ‖v‖, a norm for each unit of the axis along which g is longer than 1."""
    v, g = trace.row(call["v"]), trace.row(call["g"])
    trace.tie(v, g)
    return [v, g]


def pixel_shuffle(trace: Trace, call: Call) -> list[list[Dim]]:
    """Channels [c · r²] become c channels of r × r as many positions, or the reverse."""
    row, made = trace.row(call["self"]), call.results[0].shape
    positions = [trace.fixed(s, "positions that are shuffled") for s in made[-2:]]
    trace.fix(row[-2:], "positions that are shuffled")
    channels, new = row[-3].size, made[-3]
    if channels >= new:
        outer, inner = trace.dims.split(row[-3], [new, channels // new])
        trace.fix([inner], "positions that are shuffled")
    else:
        inner = trace.fixed(new // channels, "positions that are shuffled")
        outer = trace.dims.product([row[-3], inner])
    return [[*row[:-3], outer, *positions]]


RULES: dict[str, Rule] = {
    **SHAPING,
    **dict.fromkeys(_named("mm bmm mv dot addmm baddbmm addmv"), product),
    **dict.fromkeys(_named("_softmax _log_softmax softmax log_softmax _safe_softmax"), softmax),
    **dict.fromkeys(REDUCING, reducing),
    **dict.fromkeys(POOLING, pooling),
    "linear": linear,
    "embedding": embedding,
    **dict.fromkeys(_named("convolution _convolution convolution_overrideable"), convolution),
    **dict.fromkeys(_named("native_layer_norm _fused_rms_norm rms_norm"), layer_norm),
    **dict.fromkeys(
        _named(
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
            "miopen_batch_norm _batch_norm_with_update"
        ),
        batch_norm,
    ),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(_named("pixel_shuffle pixel_unshuffle"), pixel_shuffle),
}


def rule_for(func: Any, call: Call) -> tuple[Rule, bool]:
    """The rule of an operation, and whether it only looks at values in another shape."""
    if call.name in UNIFORM:
        into = [t for t in call.tensors if any(t is r for r in call.results)]
        return (elementwise if into else uniform), not into
    if call.name in LOOKING:
        return LOOKING[call.name], True
    if call.name in RULES:
        return RULES[call.name], False
    if torch.Tag.pointwise in func.tags or call.name in ELEMENTWISE:
        return elementwise, False
    if not call.tensors:
        return unknown, True
    return unknown, False
