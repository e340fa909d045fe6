"""Where a routed model sends its inputs: `Sent`, counted over calls within `routed.watched()`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.routing.gated import Now


class Sent:
    """Sums over rows of weights: of examples (or tokens, by their mask) and of parts, where each has its gate."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.rows = 0
        self._to = torch.zeros(len(self.tasks), dtype=torch.float64)
        self._weight = torch.zeros_like(self._to)

    def add(self, now: Now) -> None:
        """Count one call. A row is sent to an expert whose weight is above 0 and above every other's."""
        for w in now.told.values():
            counted = now.mask != 0 if now.mask is not None and w.shape[:2] == now.mask.shape else None
            rows = (w[counted] if counted is not None and w.dim() > 2 else w.flatten(0, -2)).double().cpu()
            most = rows.max(-1, keepdim=True).values
            first = (rows == most) & (most > 0)
            self._to += first[first.sum(-1) == 1].sum(0)
            self._weight += rows.sum(0)
            self.rows += len(rows)

    @property
    def shares(self) -> dict[str, float]:
        """Task → share of the rows that its expert got; what is left of 1 went to none, or evenly to several."""
        return dict(zip(self.tasks, (self._to / max(self.rows, 1)).tolist(), strict=True))

    @property
    def weights(self) -> dict[str, float]:
        """Task → mean weight of its expert."""
        return dict(zip(self.tasks, (self._weight / max(self.rows, 1)).tolist(), strict=True))
