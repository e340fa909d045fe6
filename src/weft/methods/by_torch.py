"""How torch computes a range of a merge: read the inputs, subtract the base, run the steps in float64.

It is the reference that kernels are tested against, and what merges whatever they don't take, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import execution, own_stream, to_device
from weft.late import Tensor, torch
from weft.methods.step import Bound, row_length

if TYPE_CHECKING:
    from weft.methods.merge import Merge


def merged(merge: Merge, name: str, start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
    """Elements `[start, stop)` of the merged tensor, rounded once to `dtype` (float64 without one), on the CPU."""
    with own_stream(execution().device):
        x, base = stack(merge, name, start, stop)
        out = run(merge, name, x, base, start, merge.pipeline(name).steps)
        out = out if base is None else base + out
        return (out if dtype is None else round_to(out, dtype)).cpu()


def stack(merge: Merge, name: str, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
    """The inputs' range in float64 `[k, n]`, less the base where there is one, and the base `[n]`."""
    device = execution().device
    stored, below = merge.values(name, start, stop)
    models, base = [v.tensor() for v in stored], None if below is None else below.tensor()
    if merge.nonfinite == "error":
        for values, source in zip([*models, base], merge.readers(name), strict=True):
            if values is not None and source is not None and not is_finite(values):
                merge.refuse_nonfinite(name, source)
    x = torch.empty((len(models), stop - start), dtype=torch.float64, device=device)
    for row, values in zip(x, models, strict=True):
        row.copy_(to_device(values, device))
    if base is None:
        return x, None
    base = to_device(base, device).double()
    return x.sub_(base), base


def run(
    merge: Merge, name: str, x: Tensor, base: Tensor | None, start: int, steps: Sequence[Bound]
) -> Tensor:
    """Run `steps` on a range, with the statistics found before."""
    at = replace(merge.at(name), start=start)
    n, reduced = x.shape[-1], False
    for j, bound in enumerate(steps):
        found = merge.found(name, j)
        shape = {"element": (n,), "row": (-1, row_length(at.shape)), "tensor": at.shape}[bound.grain]
        if merge.measured is not None:
            found = found | merge.measured.keywords(merge, name, bound.step, start, start + n, shape)
        models = () if reduced else (x.shape[0],)
        b = None if base is None else base.reshape(shape)
        x = bound.step.run(x.reshape(*models, *shape), bound.params, found, at, b)
        reduced = reduced or bound.step.reduces
        x = x.reshape(-1) if reduced else x.reshape(x.shape[0], -1)
    return x


def is_finite(values: Tensor) -> bool:
    """False if there is a NaN or an infinity; for any dtype, the 8-bit ones included."""
    wide = values.float() if values.dtype.itemsize == 1 else values
    return bool(wide.isfinite().all())
