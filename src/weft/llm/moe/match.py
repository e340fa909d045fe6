"""`match_experts`: the experts of one mixture put in the order of another's, before the two are merged.

Two mixtures that were trained apart may hold like experts in different places, and merging expert k with
expert k would then mix strangers. Per layer, the permutation π minimises

    Σ_i ‖A_i − B_π(i)‖²        A_i, B_j: all weights of expert i of one model and j of the other

which is a linear assignment with the costs ‖A_i‖² + ‖B_j‖² − 2⟨A_i, B_j⟩. By router, A_i and B_j are the
router's rows, less their mean over the experts: softmax does not see what all rows share. Experts, router rows
and corrections of the choice move together, so what the model computes stays the same. Where experts are
chosen by groups, only permutations that keep the groups do that: groups are then assigned to groups, and
experts within them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import Any, Literal

import torch
from torch import Tensor

from weft.checkpoints.assembled import Assembled
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import executing, execution, map_here
from weft.checkpoints.lazy import Derived
from weft.errors import DataProblems, MissingExtra, UsageError, did_you_mean
from weft.llm.moe.blocks import Block, blocks_of, rearranged, view

By = Literal["weights", "router", "both"]
AT_ONCE = 1 << 22
"""Elements of both models together that a comparison holds at once."""


def match_experts(model: Checkpoint, to: Checkpoint, by: By = "weights") -> Matched:
    """`model` with its experts in the order of `to`'s: a lazy checkpoint that computes what `model` does.

    `by` says what experts are compared by: all their weights, their router rows, or both at equal weight.
    Layers are compared when their first tensor is read. Raises UsageError where one is no mixture,
    DataProblems where layers, counts of experts or their shapes differ, MissingExtra without scipy.
    """
    return Matched(model, to, by)


class Matched(Derived):
    """See `match_experts`."""

    def __init__(self, model: Checkpoint, to: Checkpoint, by: By = "weights") -> None:
        if by not in ("weights", "router", "both"):
            raise UsageError(
                f"experts cannot be matched by {by!r}{did_you_mean(by, ('weights', 'router', 'both'))}"
            )
        _assignment()
        super().__init__(model, to)
        self.by = by
        self.origin = f"{model.origin} matched to {to.origin}"
        own, others = blocks_of(model), blocks_of(to)
        _check(own, others)
        self._pairs = list(zip(own, others, strict=True))
        self._block: dict[str, int] = {}
        self._kin: dict[str, list[str]] = {}
        for i, block in enumerate(own):
            names = [block.names(part) for part in block.experts.parts] + [[n] for n in block.routers]
            for group in names:
                self._block |= dict.fromkeys(group, i)
                self._kin |= dict.fromkeys(group, group)
        self._found: dict[int, tuple[tuple[int, ...], Assembled]] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def orders(self) -> dict[str, tuple[int, ...]]:
        """For each mixture, by prefix, which of the model's experts stands in each place."""
        return {own.prefix: self._matched(i)[0] for i, (own, _) in enumerate(self._pairs)}

    def _matched(self, index: int) -> tuple[tuple[int, ...], Assembled]:
        with self._lock:
            if index not in self._found:
                own, other = self._pairs[index]
                # a helping thread must not come back here and wait for itself
                with executing(replace(execution(), map=map_here)):
                    order = matching(own, other, self.by)
                self._found[index] = (order, Assembled(rearranged(own, order), origin=self.origin))
            return self._found[index]

    def _source(self, name: str) -> Checkpoint:
        """Where a tensor is read: the model, or the block in its new order."""
        return self._matched(self._block[name])[1] if name in self._block else self.first

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        self.info(name)
        return self._source(name).read(name, start, stop, dtype=dtype)

    def grain(self, name: str) -> int:
        kin = self._kin.get(name, [name])
        return min(lcm(*(self.first.grain(n) for n in kin)), max(1, self.info(name).numel))

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        known = self._block.get(name)
        if known is None:
            self.first.prefetch(name, start, stop)
        elif known in self._found:
            self._found[known][1].prefetch(name, start, stop)

    def ready(self, name: str) -> None:
        self._source(name).ready(name)

    def held_bytes(self, name: str) -> int:
        return 0 if name in self._block else self.first.held_bytes(name)

    def hold(self, name: str) -> None:
        if name not in self._block:
            self.first.hold(name)

    def release(self, name: str) -> None:
        if name not in self._block:
            self.first.release(name)
        elif (known := self._block[name]) in self._found:
            self._found[known][1].release(name)

    def bytes_read(self, name: str) -> int:
        own = self.first.bytes_read(name)
        return own * (3 if name in self._block else 1)  # the comparison reads both models' experts

    def working_bytes(self, name: str, count: int) -> int:
        return self.first.working_bytes(name, count) + (16 * count + 16 * AT_ONCE) * (name in self._block)

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self.by}{inner}"


def _check(own: Sequence[Block], others: Sequence[Block]) -> None:
    a, b = own[0].model.origin, others[0].model.origin
    if [x.layer for x in own] != [x.layer for x in others]:
        raise DataProblems(
            f"the experts of {a} cannot be matched to those of {b}",
            [f"{len(own)} layers with experts in {a}, {len(others)} in {b}"],
        )
    problems = []
    for x, y in zip(own, others, strict=True):
        if x.count != y.count:
            more = a if x.count > y.count else b
            problems.append(f"{x.prefix}: {x.count} experts in {a}, {y.count} in {b}; bring {more} to "
                            f"{min(x.count, y.count)} with reduce_experts (weft moe reduce)")  # fmt: skip
        elif [len(s) for s in _expert(x, 0)] != [len(s) for s in _expert(y, 0)]:
            problems.append(f"{x.prefix}: the experts have other shapes in {a} than in {b}")
        elif _groups(x) != _groups(y):
            problems.append(f"{x.prefix}: the experts stand in {_groups(x)} groups in {a}, "
                            f"in {_groups(y)} in {b}")  # fmt: skip
    if problems:
        raise DataProblems(f"the experts of {a} cannot be matched to those of {b}", problems)


def _expert(block: Block, e: int) -> list[Any]:
    """The spans of one expert, in an order that both layouts share where they can."""
    if block.roles() is not None:
        return [block.role(role, e) for role in ("gate", "up", "down")]
    return [block.part(part, e) for part in sorted(block.experts.parts)]


def matching(own: Block, other: Block, by: By = "weights") -> tuple[int, ...]:
    """π: which expert of `own` belongs in each place of `other`."""
    cost = torch.zeros(own.count, own.count, dtype=torch.float64)
    if by in ("weights", "both"):
        cost += _distances(other, own)
    if by in ("router", "both"):
        cost += _scaled(_router_rows(other), _router_rows(own))
    return _cheapest(cost, _groups(own))


def _distances(a: Block, b: Block) -> Tensor:
    """‖A_i − B_j‖² over all weights, `[E, E]` float64, in units of the mean ‖·‖²; streamed."""
    count = a.count
    products = torch.zeros(count, count, dtype=torch.float64)
    squares = [torch.zeros(count, dtype=torch.float64) for _ in range(2)]
    spans = [[_expert(block, e) for e in range(count)] for block in (a, b)]
    for p in range(len(spans[0][0])):
        views = [view({str(e): experts[e][p] for e in range(count)}) for experts in spans]
        length, step = len(spans[0][0][p]), max(1, AT_ONCE // (2 * count))
        for v in views:
            v.survey()
            for name in v:
                v.ready(name)
        for start in range(0, length, step):
            stop = min(start + step, length)
            x, y = (torch.stack([v.read(n, start, stop).double() for n in v]) for v in views)
            products += x @ y.T
            squares[0] += x.square().sum(1)
            squares[1] += y.square().sum(1)
        for v in views:
            for name in v:
                v.release(name)
    return _as_cost(products, *squares)


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    return _as_cost(x @ y.T, x.square().sum(1), y.square().sum(1))


def _as_cost(products: Tensor, a: Tensor, b: Tensor) -> Tensor:
    scale = (a.mean() + b.mean()).clamp(min=1e-30) / 2
    return (a[:, None] + b[None, :] - 2 * products) / scale


def _router_rows(block: Block) -> Tensor:
    """The router's rows `[E, H]`, float64, less their mean."""
    block.model.survey()
    block.model.ready(block.rows)
    rows = block.model.tensor(block.rows).double()
    return rows - rows.mean(0)


def _groups(block: Block) -> int:
    """How many groups the experts are chosen by; 1 where the choice is free."""
    config = block.model.config or {}
    groups = config.get("n_group")
    return groups if isinstance(groups, int) and groups > 1 and block.count % groups == 0 else 1


def _cheapest(cost: Tensor, groups: int) -> tuple[int, ...]:
    """The column for each row: an assignment of groups to groups, of experts to experts within each."""
    assign = _assignment()
    size = len(cost) // groups
    inner: dict[tuple[int, int], list[int]] = {}
    outer = torch.zeros(groups, groups, dtype=torch.float64)
    for g in range(groups):
        for h in range(groups):
            square = cost[g * size : (g + 1) * size, h * size : (h + 1) * size].numpy()
            rows, columns = assign(square)
            inner[g, h] = columns.tolist()
            outer[g, h] = float(square[rows, columns].sum())
    chosen = assign(outer.numpy())[1].tolist()
    return tuple(h * size + c for g, h in enumerate(chosen) for c in inner[g, h])


def _assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("scipy", "llm", "matching experts") from None
    return linear_sum_assignment
