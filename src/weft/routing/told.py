"""What a call is told: tasks, weights, preferences as rows [B, T]; how many examples it has, and what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import UsageError, did_you_mean
from weft.statistics.batches import MASKS


def task_rows(tasks: Sequence[str], task: int | str | Sequence[int | str] | Tensor, size: int) -> Tensor:
    """One-hot rows of a task, or of one an example (names or numbers). UsageError naming one that is unknown."""
    if isinstance(task, Tensor):
        index = task.detach().cpu().long().reshape(-1)
        if bool(((index < 0) | (index >= len(tasks))).any()):
            raise UsageError(f"tasks are numbers 0 to {len(tasks) - 1}")
    else:
        given = [task] if isinstance(task, int | str) else list(task)
        names = [tasks[n] if isinstance(n, int) and 0 <= n < len(tasks) else n for n in given]
        unknown = [n for n in names if n not in tasks]
        if unknown:
            hint = did_you_mean(str(unknown[0]), tasks)
            raise UsageError(f"there is no task {unknown[0]!r}{hint}; known: {', '.join(tasks)}")
        index = torch.tensor([list(tasks).index(str(n)) for n in names], dtype=torch.int64)
    if len(index) not in (1, size):
        raise UsageError(f"{len(index)} tasks are named for {size} examples: give one, or one an example")
    return nn.functional.one_hot(index, len(tasks)).float().expand(size, -1)


def rows(tasks: Sequence[str], given: Any, size: int, what: str) -> Tensor:
    """From [T], [1, T] or [B, T]. UsageError for another shape, or numbers that are not finite."""
    w = torch.as_tensor(given, dtype=torch.float32)
    w = w[None] if w.dim() == 1 else w
    if w.dim() != 2 or w.shape[1] != len(tasks) or w.shape[0] not in (1, size):
        raise UsageError(
            f"{what} must have one number a task ({', '.join(tasks)}), for all examples or each; its shape is "
            f"{list(w.shape)}"
        )
    if not bool(w.isfinite().all()):
        raise UsageError(f"{what} has NaN or infinite values")
    return w.expand(size, -1)


def preferences(tasks: Sequence[str], given: Any, size: int) -> Tensor:
    """A preference as shares: not below zero, summing to one."""
    r = rows(tasks, given, size, "preference")
    if bool((r < 0).any()) or bool((r.sum(-1) <= 0).any()):
        raise UsageError("a preference is a share a task: no number below 0, and not all 0")
    return r / r.sum(-1, keepdim=True)


def mask_of(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens count, [B, L]."""
    found = next((kwargs[n] for n in MASKS if isinstance(kwargs.get(n), Tensor)), None)
    return found if found is not None and found.dim() == 2 else None


def size_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """How many examples a call has: the length of its first tensor."""
    for value in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(value, Tensor) and value.dim():
            if not len(value):
                raise UsageError("there are no examples in this batch")
            return len(value)
    raise UsageError("call the routed model with at least one tensor whose first axis is the examples")
