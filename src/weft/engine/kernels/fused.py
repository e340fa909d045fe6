"""`Kernels`: runs merges and statistics through fused loops, falling back to torch step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import TILE
from weft.engine.kernels import primitives
from weft.engine.kernels.emit import EMITTERS
from weft.engine.kernels.generate import Source, compiled
from weft.methods.params import per_model
from weft.methods.random import stream_key
from weft.methods.stats import Counted, Gram, Select
from weft.methods.step import At, Bound, row_length

if TYPE_CHECKING:
    from weft.methods.merge import Merge

_LONGEST_BUCKET = 96


class Kernels:
    """Fused execution of one save. Stateless but for the compiled code, so threads share it."""

    def merge(
        self, node: Merge, name: str, start: int, stop: int, dtype: torch.dtype | None
    ) -> Tensor | None:
        """The merged range, rounded to `dtype` (float64 without one); None where torch must do it."""
        if stop == start or (start >> 32) != ((stop - 1) >> 32):
            return None
        steps = node.pipeline(name).steps
        inputs, base = self._inputs(node, name, start, stop)
        at = replace(node.at(name), start=start)
        direct = dtype if dtype in (torch.bfloat16, torch.float32, torch.float64) else torch.float64
        out = torch.empty(stop - start, dtype=direct)
        stack = self._run(node, name, inputs, base, steps, at, upto=len(steps), out=out)
        if stack is not None:  # the last steps ran in torch
            value = stack if base is None else _float64(base) + stack
            return value if dtype is None else round_to(value, dtype)
        return out if dtype in (None, direct) else round_to(out, dtype)  # type: ignore[arg-type]

    def partial(self, node: Merge, name: str, j: int, start: int, stop: int, memo: Any) -> Any:
        """Step j's statistic of a range; None where torch must do it."""
        steps = node.pipeline(name).steps
        stat = steps[j].step.stat
        simple = type(stat) is Gram or (type(stat) is Select and stat.value is None)
        if stop == start or not simple or (start >> 32) != ((stop - 1) >> 32):
            return None
        inputs, base = self._inputs(node, name, start, stop)
        at = replace(node.at(name), start=start)
        lead = _fusable(steps[:j])
        if lead < j:
            stack = self._run(node, name, inputs, base, steps[:j], at, upto=j, out=None)
            assert stack is not None
            inputs, base, lead, steps = list(stack), None, 0, steps[j:]
        source = _source(inputs, base)
        for i, bound in enumerate(steps[:lead]):
            _emit(source, node, name, i, bound, at)
        if type(stat) is Gram:
            return _gram(source, inputs, base, at)
        return _counts(source, inputs, base, at, memo, keep=steps[j if lead == j else 0].scope == "tensor")

    def _inputs(self, node: Merge, name: str, start: int, stop: int) -> tuple[list[Tensor], Tensor | None]:
        inputs, base = node.values(name, start, stop)
        if node.nonfinite == "error":
            for values, source in zip([*inputs, base], node.readers(name), strict=True):
                if values is not None and source is not None and _nonfinite(values):
                    node.refuse_nonfinite(name, source)
        return inputs, base

    def _run(
        self,
        node: Merge,
        name: str,
        inputs: list[Tensor],
        base: Tensor | None,
        steps: Sequence[Bound],
        at: At,
        upto: int,
        out: Tensor | None,
    ) -> Tensor | None:
        """Run steps [0, upto). The last fused run writes to `out` if given, and None is returned."""
        j, stack, fresh = 0, inputs, True
        while True:
            run = _fusable(steps[j:upto])
            last = j + run == upto
            target = out if last else None
            if run or fresh or (last and out is not None):
                source = _source(stack, base if fresh else None)
                for i, bound in enumerate(steps[j : j + run], j):
                    _emit(source, node, name, i, bound, at)
                reduced = len(source.body.values) == 1 and any(b.step.reduces for b in steps[: j + run])
                if last and out is not None:
                    _apply(source, stack, base if fresh else None, at, out, base)
                    return None
                stack = list(_stacked(source, stack, base if fresh else None, at))
                fresh = False
                if reduced:
                    stack = stack[:1]
            j += run
            if j == upto:
                whole = torch.stack(stack)
                return whole[0] if any(b.step.reduces for b in steps[:upto]) else whole
            stack = self._in_torch(node, name, stack, base, steps, j, at)
            j += 1
            if j == upto and out is None:
                whole = torch.stack(stack)
                return whole[0] if any(b.step.reduces for b in steps[:upto]) else whole

    def _in_torch(
        self, node: Merge, name: str, stack: list[Tensor], base: Tensor | None,
        steps: Sequence[Bound], j: int, at: At,
    ) -> list[Tensor]:  # fmt: skip
        """One step without an emitter, on the float64 stack."""
        bound = steps[j]
        if bound.step.name == "thin" and _thin(stack, bound, at):
            return stack
        reduced = any(b.step.reduces for b in steps[:j])
        shape = {"element": (-1,), "row": (-1, row_length(at.shape)), "tensor": at.shape}[bound.grain]
        x = stack[0] if reduced else torch.stack(stack)
        x = x.reshape(*(() if reduced else (len(stack),)), *shape)
        b = None if base is None else _float64(base).reshape(shape)
        done = bound.step.run(x, bound.params, node.found(name, j), at, b)
        return [done.reshape(-1)] if reduced or bound.step.reduces else list(done.reshape(len(stack), -1))


def _fusable(steps: Sequence[Bound]) -> int:
    """How many of the first steps have emitters."""
    for n, bound in enumerate(steps):
        if bound.step.name not in EMITTERS:
            return n
    return len(steps)


def _emit(source: Source, node: Merge, name: str, j: int, bound: Bound, at: At) -> None:
    EMITTERS[bound.step.name](source.body, bound.params, node.found(name, j), at)


def _source(inputs: Sequence[Tensor], base: Tensor | None) -> Source:
    raw = [x.dtype == torch.bfloat16 for x in inputs]
    return Source(raw, None if base is None else base.dtype == torch.bfloat16)


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """A kernel's view of a 1-D tensor: raw uint16 for bf16, else float32 or float64."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).numpy()


def _float64(x: Tensor) -> Tensor:
    return x.double()


def _nonfinite(x: Tensor) -> bool:
    found = primitives.nonfinite_bf16 if x.dtype == torch.bfloat16 else primitives.nonfinite_float
    return bool(found(_array(x)))


def _call(
    source: Source, text: str, inputs: Sequence[Tensor], base: Tensor | None, at: At, *extra: Any
) -> Any:
    arrays = [_array(x) for x in inputs] + ([] if base is None else [_array(base)])
    p = np.array(source.body.floats, np.float64)
    q = np.array(source.body.words, np.uint32)
    return compiled(text)(*arrays, *extra, p, q, np.uint32(at.start & 0xFFFFFFFF))


def _apply(
    source: Source, inputs: Sequence[Tensor], base: Tensor | None, at: At, out: Tensor, add: Tensor | None
) -> None:
    """Run the body and round the result into `out`, plus the base where there is one."""
    value = source.body.values[0]
    raw = out.dtype == torch.bfloat16
    if add is not None and base is None:  # the stack was formed before; the base comes in again here
        source.arguments.append("b")
        source.loads.append(
            "base = " + ("from_bf16(b[i])" if add.dtype == torch.bfloat16 else "np.float64(b[i])")
        )
    text = source.finish(
        ["out"],
        "buf = np.empty(BLOCK, np.float64)",
        [f"buf[j] = base + {value}" if add is not None else f"buf[j] = {value}"],
        f"{'store_bf16' if raw else 'store_float'}(buf, m, out, s)",
    )
    target = out.view(torch.uint16).numpy() if raw else out.numpy()
    _call(source, text, inputs, add, at, target)


def _stacked(source: Source, inputs: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
    """Run the body into a float64 stack [k', n]."""
    values = source.body.values
    out = torch.empty((len(values), inputs[0].numel()), dtype=torch.float64)
    text = source.finish(["out"], "", [f"out[{i}, i] = {v}" for i, v in enumerate(values)], "")
    _call(source, text, inputs, base, at, out.numpy())
    return out


def _gram(source: Source, inputs: Sequence[Tensor], base: Tensor | None, at: At) -> Tensor:
    """Gram.partial: [tiles, k(k+1)/2]."""
    values = source.body.values
    k, n = len(values), inputs[0].numel()
    out = np.zeros((max(1, -(-n // TILE)), k * (k + 1) // 2), np.float64)
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    text = source.finish(
        ["out"],
        f"buf = np.empty(({k}, BLOCK), np.float64)",
        [f"buf[{i}, j] = {v}" for i, v in enumerate(values)],
        "\n".join(f"out[s // {TILE}, {c}] += dot(buf[{i}], buf[{j}], m)" for c, (i, j) in enumerate(pairs)),
    )
    _call(source, text, inputs, base, at, out)
    return torch.from_numpy(out)


def _counts(
    source: Source, inputs: Sequence[Tensor], base: Tensor | None, at: At, memo: Any, keep: bool
) -> Tensor | Counted:
    """Select.partial: counts [k, q, digits], with the keys that make a second pass unnecessary if `keep`."""
    values = source.body.values
    k, n = len(values), inputs[0].numel()
    keys = [f"keys[{i}, j] = np.float32(abs({v})).view(np.uint32)" for i, v in enumerate(values)]
    loads = None
    if not source.body.lines and all(
        x.dtype in (torch.bfloat16, torch.float32, torch.float16) for x in inputs
    ):
        # nothing was done to the difference yet
        minus = f" - {source.short[k]}" if base is not None else ""
        loads = [f"f{i} = np.float32({source.short[i]}{minus})" for i in range(k)]
        keys = [f"keys[{i}, j] = np.float32(abs(f{i})).view(np.uint32)" for i in range(k)]
    before = f"keys = np.empty(({k}, BLOCK), np.uint32)"
    if memo is None:
        out = np.zeros((k, 2, 1 << 15), np.int32)  # a range is shorter than 2**31
        rest = np.empty((k, (n // 8 if keep else 0) + 1), np.uint32)
        kept = np.zeros(k, np.int64)
        text = source.finish(
            ["out", "rest", "kept"], before, keys,
            "\n".join(f"kept[{i}] = count_upper(keys[{i}], m, out[{i}], rest[{i}], kept[{i}])" for i in range(k)),
            loads,
        )  # fmt: skip
        _call(source, text, inputs, base, at, out, rest, kept)
        counts = torch.from_numpy(out[:, :1].astype(np.int64) + out[:, 1:])
        if not keep or kept.max() >= rest.shape[1]:
            return counts
        return Counted(counts, tuple((torch.from_numpy(rest[i, : kept[i]].copy()),) for i in range(k)))
    prefix = memo["prefix"].numpy().astype(np.uint32)  # [k, q]
    q = prefix.shape[1]
    out = np.zeros((k, q, 1 << 16), np.int64)
    text = source.finish(
        ["prefix", "out"], before, keys,
        "\n".join(
            f"count_lower(keys[{i}], m, prefix[{i}, {c}], out[{i}, {c}])" for i in range(k) for c in range(q)
        ),
        loads,
    )  # fmt: skip
    _call(source, text, inputs, base, at, prefix, out)
    return torch.from_numpy(out)


def _thin(stack: list[Tensor], bound: Bound, at: At) -> bool:
    """DELLA's rank-dependent dropping in place; False where a row's magnitudes are too uneven."""
    n, params = row_length(at.shape), bound.params
    done = []
    for i, (x, p) in enumerate(zip(stack, per_model(params["density"], len(stack)), strict=True)):
        window = min(params["epsilon"], p, 1.0 - p)
        k0, k1 = stream_key(at.seed, i, at.name, at.start >> 32)
        trial = x.clone()
        if not primitives.thin_rows(
            trial.numpy(), n, p, window, params["rescale"], at.start & 0xFFFFFFFF, np.uint32(k0), np.uint32(k1),
            _LONGEST_BUCKET,
        ):  # fmt: skip
            return False
        done.append(trial)
    stack[:] = done
    return True
