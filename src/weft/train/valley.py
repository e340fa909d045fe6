"""SWAD: every iterate is averaged while the validation loss lies in its valley. Cha et al. 2021, arXiv:2102.08604.

Iterates between two validations form a segment, which is averaged. With the losses ℓ at the segments' ends

    start   when of the last N_s losses the first is the least; from then on a segment belongs
    end     when the least of the next N_e losses is above (1 + r) · mean of those N_s losses
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError
from weft.train.hooks import State
from weft.train.trace import Trace, Weights


def valley(losses: Sequence[float], converge: int = 3, tolerance: int = 6, ratio: float = 0.3) -> range:
    """Which segments belong to the valley of these losses; empty where the loss never settles."""
    for start in range(len(losses) - converge + 1):
        window = losses[start : start + converge]
        if min(window) == window[0]:
            break
    else:
        return range(0)
    bound = (1 + ratio) * sum(window) / converge
    end = start + 1
    while end < len(losses) and min(losses[end : end + tolerance]) <= bound:
        end += 1
    return range(start, end)


class Valley:
    """A hook for `on_step`. `loss` is measured on validation data every `every` steps, of the weights as they are.

    Segments are kept as their means, those before the valley dropped; `checkpoint()` is the mean of the valley's.
    After its end nothing is measured any more.
    """

    def __init__(
        self, loss: Callable[[Checkpoint], float], every: int, *, converge: int = 3, tolerance: int = 6,
        ratio: float = 0.3,
    ) -> None:  # fmt: skip
        if min(every, converge, tolerance) < 1 or ratio < 0:
            raise UsageError("every, converge and tolerance must be 1 or more, and ratio 0 or more")
        self.loss, self.every = loss, every
        self.settings = (converge, tolerance, ratio)
        self.losses: list[float] = []
        self._segments: list[Weights | None] = []
        self._open = Trace("mean")

    def __call__(self, state: State) -> None:
        """Take the weights of a step in; at the end of a segment, measure."""
        if self.over:
            return
        weights = state.weights()
        self._open.add(weights, state.step)
        if state.step % self.every:
            return
        found = float(self.loss(StateDict(weights, "weights of a run")))
        if not math.isfinite(found):
            raise DataError(
                f"the validation loss after step {state.step} is {found}: it must be a finite number"
            )
        self.losses.append(found)
        self._segments.append(self._open.checkpoint().state_dict())
        self._open = Trace("mean")
        kept = self.segments
        for i in range(kept.start if kept else max(0, len(self.losses) - self.settings[0] + 1)):
            self._segments[i] = None  # before the valley

    @property
    def segments(self) -> range:
        """Segments of the valley, as far as is known."""
        return valley(self.losses, *self.settings)

    @property
    def over(self) -> bool:
        """Whether the valley has ended: later weights do not count."""
        return bool(self.segments) and self.segments.stop < len(self.losses) - self.settings[1] + 1

    def checkpoint(self) -> Checkpoint:
        """The mean of the valley. DataError where the validation loss never settled."""
        if not self.segments:
            raise DataError(
                f"the validation loss never settled over {len(self.losses)} measurements: train longer, measure "
                "less often, or lower converge"
            )
        whole = Trace("mean")
        for i in self.segments:
            segment = self._segments[i]
            assert segment is not None
            whole.add(segment, (i + 1) * self.every)
        return whole.checkpoint()
