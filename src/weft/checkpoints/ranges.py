"""The one rule for ranges of elements that every checkpoint's `read` shares."""

from __future__ import annotations

from weft.checkpoints.base import TensorInfo
from weft.errors import UsageError


def element_range(
    name: str, info: TensorInfo, start: int, stop: int | None, grain: int = 1
) -> tuple[int, int]:
    """`(start, stop)` with the default filled in; UsageError unless inside the tensor and on its grain."""
    numel = info.numel
    stop = numel if stop is None else stop
    if not 0 <= start <= stop <= numel:
        raise UsageError(f"elements {start}:{stop} do not lie in tensor {name!r} of {numel} elements")
    if grain > 1 and (start % grain or (stop % grain and stop != numel)):
        raise UsageError(f"elements {start}:{stop} of tensor {name!r} must be multiples of its grain {grain}")
    return start, stop
