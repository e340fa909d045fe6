"""Watching a forward pass: the inputs and outputs of every linear map that uses a parameter.

A mode of torch sees each call of linear, matmul, convolution, embedding, normalisation and multiplication, by
whichever module it is made; nothing needs to be known of the architecture. Attention in one call
(`F.multi_head_attention_forward`) is taken apart, so that its projections are seen like any others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from weft.statistics.uses import Parameters, Use

Back = Callable[[Use, Tensor], None]
"""Told of the gradient at the outputs of one use, [b, n, o]."""
Seen = Callable[[Use, Tensor, Tensor], None]
"""Told of one use: inputs x [b, n, d] (of a table: indices [n]; of a scale: [n, d]) and outputs y [b, n, o]."""

LINEAR = (F.linear,)
PRODUCT = (torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)
STACKED = (torch.bmm, Tensor.bmm)
CONVOLUTION = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
TIMES = (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
CHANNELS_LAST = (F.layer_norm, F.rms_norm)
CHANNELS_SECOND = (F.group_norm, F.batch_norm, F.instance_norm)


class Observer(TorchFunctionMode):
    """Tells `seen` of every use of the parameters while it is in force."""

    def __init__(
        self, parameters: Parameters, seen: Seen, masks: Sequence[Tensor] = (), back: Back | None = None
    ) -> None:
        super().__init__()
        self.back = back
        self.parameters, self.seen, self.masks = parameters, seen, list(masks)
        self.unmasked: set[str] = set()
        """Parameters some of whose inputs could not be told apart by the mask."""
        self._sequence_first = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            return self._attention(func, args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor) -> None:
        if func in LINEAR:
            x, w = _given(args, kwargs, "input", "weight")
            self._map(self.parameters.find(w), x, y)
        elif func in PRODUCT and isinstance(args[1], Tensor) and args[1].dim() == 2:
            self._map(self.parameters.find(args[1], flipped=True), args[0], y)
        elif func is torch.addmm:
            self._map(self.parameters.find(args[2], flipped=True), args[1], y)
        elif func in STACKED or (func in PRODUCT and isinstance(args[1], Tensor) and args[1].dim() == 3):
            self._stacked(args[0], args[1], y)
        elif func in CONVOLUTION or func in TRANSPOSED:
            self._convolution(func, args, kwargs, y)
        elif func is F.embedding:
            ids, w = _given(args, kwargs, "input", "weight")
            use = self.parameters.table(w)
            if use is not None:
                rows, out = self._rows(use, ids[..., None], y)
                self.seen(use, rows[:, 0], out[None])
        elif func in CHANNELS_LAST or func in CHANNELS_SECOND:
            self._norm(func, args, kwargs, y)
        elif func in TIMES and isinstance(args[0], Tensor) and isinstance(args[1], Tensor):
            for w, x in ((args[0], args[1]), (args[1], args[0])):
                use = self.parameters.scale(w) if x.dim() > 1 and x.shape[-1] == len_of(w) else None
                if use is not None:
                    self.seen(use, *self._rows(use, x, y))

    def _map(self, use: Use | None, x: Tensor, y: Tensor) -> None:
        if use is not None:
            rows, out = self._rows(use, x, y)
            self.seen(use, rows[None], out[None])
            self._hook(use, y)

    def _stacked(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        """x [b, n, d] times a stack of maps w [b, d, o], as [in, out] or the transpose of [out, in]."""
        if x.dim() != 3 or w.dim() != 3 or x.shape[0] != w.shape[0]:
            return
        flipped = w.is_contiguous()
        use = self.parameters.find(w if flipped else w.transpose(1, 2))
        if use is not None:  # find takes the stack for b rows of one matrix
            width = w.shape[2] if flipped else w.shape[1]
            rows = w.numel() // w.shape[0] // width
            each = [
                Use(use.name, (use.first + i) * rows, rows, use.of * rows, flipped) for i in range(len(x))
            ]
            for one, xi, yi in zip(each, x, y, strict=True):
                self.seen(one, xi[None], yi[None])
            if self.back is not None and y.requires_grad:
                back = self.back
                y.register_hook(lambda g: [back(u, gi) for u, gi in zip(each, g, strict=True)] and None)  # type: ignore[no-untyped-call]

    def _convolution(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor) -> None:
        n = CONVOLUTION.get(func) or TRANSPOSED[func]
        rest = ("padding", "output_padding", "groups", "dilation") if func in TRANSPOSED else (
            "padding", "dilation", "groups")  # fmt: skip
        told: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        told |= dict(zip(("input", "weight", "bias", "stride", *rest), args, strict=False)) | dict(kwargs)
        x, w, groups = told["input"], told["weight"], told["groups"]
        use = self.parameters.find(w)
        if use is None:
            return
        if x.dim() == n + 1:
            x, y = x[None], y[None]
        if func in TRANSPOSED:  # each position is a row; a row's output is a patch, which overlaps others
            rows = _grouped(self._rows(use, x.movedim(1, -1))[0], groups)
            turned = Use(use.name, use.first, use.rows, use.of, True)
            self.seen(turned, rows, rows.new_zeros(groups, rows.shape[1], 0))
            return
        places = windows(x, w.shape[2:], told["stride"], told["padding"], told["dilation"])
        rows, outs = self._rows(use, places, y.movedim(1, -1))
        self.seen(use, _grouped(rows, groups), _grouped(outs, groups))
        self._hook(use, y, groups, 1)

    def _norm(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor) -> None:
        """A norm's weight multiplies the normalised values: what the norm gives without weight and bias."""
        told = signature(func).bind(*args, **kwargs).arguments
        w = told.get("weight")
        use = None if w is None else self.parameters.scale(w)
        if use is None:
            return
        plain = {**told, "weight": None}
        if "bias" in plain:
            plain["bias"] = None
        for name in ("running_mean", "running_var"):  # the module's own are moved by its own call, once
            if plain.get(name) is not None:
                plain[name] = plain[name].clone()
        x = func(**plain)
        if func in CHANNELS_SECOND:
            x, y = x.movedim(1, -1), y.movedim(1, -1)
        self.seen(use, *self._rows(use, x, y))

    def _attention(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The projections done one by one, under watch; attention itself with projections that change nothing."""
        bound = signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        a = bound.arguments
        weight, bias, size = a["out_proj_weight"], a["out_proj_bias"], a["embed_dim_to_check"]
        before, self._sequence_first = self._sequence_first, True
        try:
            with self:
                q, k, v = self._projected(a)
            same = torch.eye(size, dtype=q.dtype, device=q.device)
            a.update(
                query=q, key=k, value=v, use_separate_proj_weight=True, in_proj_weight=None,
                in_proj_bias=None, q_proj_weight=same, k_proj_weight=same, v_proj_weight=same,
                out_proj_weight=same, out_proj_bias=None,
            )  # fmt: skip
            mixed, scores = func(*bound.args, **bound.kwargs)
            with self:
                return F.linear(mixed, weight, bias), scores
        finally:
            self._sequence_first = before

    def _projected(self, a: Mapping[str, Any]) -> Sequence[Tensor]:
        """Queries, keys and values, from one fused projection or three."""
        query, key, value = inputs = [a[n] for n in ("query", "key", "value")]
        fused, bias = a["in_proj_weight"], a["in_proj_bias"]
        if not a["use_separate_proj_weight"] and query is key and key is value:
            return F.linear(query, fused, bias).chunk(3, dim=-1)
        parts = [a[f"{n}_proj_weight"] for n in "qkv"] if a["use_separate_proj_weight"] else fused.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, parts, biases, strict=True)]

    def _hook(self, use: Use, y: Tensor, groups: int = 1, channels: int = -1) -> None:
        """Have the gradient at y told when it is known, in the rows that y was told in."""
        if self.back is None or not y.requires_grad:
            return
        back, first = self.back, self._sequence_first

        def told(g: Tensor) -> None:
            with torch.no_grad():
                before, self._sequence_first = self._sequence_first, first
                (rows,) = self._rows(use, g.movedim(channels, -1))
                self._sequence_first = before
                back(use, _grouped(rows, groups))

        y.register_hook(told)  # type: ignore[no-untyped-call]

    def _rows(self, use: Use, *tensors: Tensor) -> list[Tensor]:
        """[..., d] → [n, d] for every tensor, less the positions that a mask leaves out."""
        lead = tensors[0].shape[:-1]
        kept = self._kept(use, tuple(lead))
        flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
        return flat if kept is None else [t[kept] for t in flat]

    def _kept(self, use: Use, lead: tuple[int, ...]) -> Tensor | None:
        """Which positions count, flat; None for all."""
        for mask in self.masks:
            size = tuple(mask.shape)
            if self._sequence_first and lead[:2] == size[::-1]:
                return _spread(mask.T, lead)
            if lead[: len(size)] == size:
                return _spread(mask, lead)
            if lead == (mask.numel(),):
                return mask.reshape(-1)
            if lead[:2] == size[::-1]:
                return _spread(mask.T, lead)
        if self.masks and lead != (self.masks[0].shape[0],):  # one row an example: nothing to leave out
            self.unmasked.add(use.name)
        return None


def len_of(w: Tensor) -> int:
    """Length of a vector; −1 for what is none."""
    return w.shape[0] if w.dim() == 1 else -1


def _given(args: Sequence[Any], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    return [args[i] if i < len(args) else kwargs[n] for i, n in enumerate(names)]


def _spread(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    wide = mask.reshape(*mask.shape, *[1] * (len(lead) - mask.dim()))
    return wide.expand(lead).reshape(-1)


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[n, g·d] → [g, n, d]."""
    return rows.reshape(len(rows), groups, -1).transpose(0, 1)


def windows(x: Tensor, size: Sequence[int], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """What each output of a convolution sees: x [B, C, *space] → [B, *space of the output, C·∏size]."""
    n = len(size)
    stride, dilation = _each(stride, n), _each(dilation, n)
    if padding == "same":
        total = [d * (s - 1) for d, s in zip(dilation, size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, n)]
    x = F.pad(x, [p for side in reversed(sides) for p in side])
    for i in range(n):
        x = x.unfold(2 + i, dilation[i] * (size[i] - 1) + 1, stride[i])[..., :: dilation[i]]
    # [B, C, *out, *size] → [B, *out, C, *size]
    return x.movedim(1, 1 + n).flatten(1 + n)


def _each(value: Any, n: int) -> list[int]:
    return (
        [int(value)] * n
        if isinstance(value, int)
        else [int(v) for v in (value * n if len(value) == 1 else value)]
    )


@contextmanager
def slow_attention() -> Iterator[None]:
    """Attention in python: its fast path in one kernel would show nothing."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
