"""Running sums over what the uses of parameters see, in float64, and the statistics they give.

    gram     Σ x xᵀ / n   [d, d]; [b, d, d] of b blocks; the diagonal alone of tables [V] and scales [d]
    mean     Σ x / n      [d]           abs_mean  Σ |x| / n
    out_mean Σ y / n      [o]           out_var   Σ y² / n − mean²        cov  Σ y yᵀ / n − mean meanᵀ
    kfac_a   the gram;    kfac_g  Σ g gᵀ / n, g the gradient at the output of each row

n counts rows: examples, or tokens, or positions of a convolution. Products are float64 unless `precision` says
float32 (half the time, and errors near 1e-7 of the largest entry); what is added up is float64 in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from weft.errors import DataError
from weft.statistics.uses import Use, block_rows, by_parameter

OF_INPUTS = ("gram", "mean", "abs_mean", "kfac_a")
OF_OUTPUTS = ("out_mean", "out_var", "cov")
OF_GRADIENTS = ("kfac_g",)
Precision = Literal["float64", "float32"]
CHUNK = 1 << 22
"""Entries of x that are widened at a time."""


class Sums:
    """The sums of one model over all batches, by use."""

    def __init__(self, what: Iterable[str], precision: Precision = "float64") -> None:
        self.what = set(what)
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self._sums: dict[Use, dict[str, Tensor]] = {}
        self.rows: dict[Use, int] = {}
        self.rows_back: dict[Use, int] = {}
        self._rows_before: dict[Use, int] = {}

    def seen(self, use: Use, x: Tensor, y: Tensor) -> None:
        """Add the rows of one call; x [b, n, d] (tables: [n], scales: [n, d]), y [b, n, o]."""
        sums = self._sums.setdefault(use, {})
        n = x.shape[0] if use.table or use.scale else x.shape[1]
        self.rows[use] = self.rows.get(use, 0) + n
        if n == 0:
            return
        if use.table:
            if self.what & {"gram", "kfac_a"}:
                _add(sums, "xx", torch.bincount(x, minlength=use.rows).double())
        else:
            _refuse_nonfinite(use, x, "inputs")
            for part in _chunks(x[None] if use.scale else x, self.dtype):
                self._add_inputs(sums, part, use.scale)
        if y.shape[-1] and self.what & set(OF_OUTPUTS):
            _refuse_nonfinite(use, y, "outputs")
            for part in _chunks(y if y.dim() == 3 else y[None], self.dtype):
                flat = part.transpose(0, 1).flatten(1)  # groups side by side, as the outputs are
                _add(sums, "y", flat.sum(0).double())
                if "cov" in self.what:
                    _add(sums, "yy", (flat.T @ flat).double())
                elif "out_var" in self.what:
                    _add(sums, "yy", flat.square().sum(0).double())

    def _add_inputs(self, sums: dict[str, Tensor], x: Tensor, diagonal: bool) -> None:
        if self.what & {"gram", "kfac_a"}:
            _add(sums, "xx", (x.square().sum(1) if diagonal else x.transpose(1, 2) @ x).double())
        if "mean" in self.what:
            _add(sums, "x", x.sum(1).double())
        if "abs_mean" in self.what:
            _add(sums, "|x|", x.abs().sum(1).double())

    def gradient(self, use: Use, g: Tensor) -> None:
        """Add the gradients at the outputs, [n, o] or [b, n, o]."""
        g = g if g.dim() == 3 else g[None]
        _refuse_nonfinite(use, g, "gradients")
        sums = self._sums.setdefault(use, {})
        self.rows_back[use] = self.rows_back.get(use, 0) + g.shape[1]
        for part in _chunks(g, self.dtype):
            _add(sums, "gg", (part.transpose(1, 2) @ part).double())

    def backward_passes(self, n: int) -> None:
        """Say that the last batch's gradients came in n passes, so that its rows are counted once.

        Each pass adds the same rows, so all but one n-th of what this batch added is taken off again.
        """
        for use, now in self.rows_back.items():
            before = self._rows_before.get(use, 0)
            self.rows_back[use] = before + (now - before) // n
        self._rows_before = dict(self.rows_back)

    def results(self, tied: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """`"{kind}/{name}"` → statistic, float64; parts of one parameter joined into blocks.

        `tied` maps further names of parameters to the first. A table that is a linear map, too (an embedding that
        is the head of a language model) has its statistics as a map under its further name.
        """
        found: dict[str, Tensor] = {}
        every = by_parameter(self._sums)
        further = {first: other for other, first in (tied or {}).items()}
        for (name, table), uses in every.items():
            if not table and (name, True) in every:
                if name not in further:
                    continue
                name = further[name]
            if len({u.transposed for u in uses}) > 1:  # a tied matrix used both ways: as it is stored
                uses = [u for u in uses if not u.transposed]
            for key, kind in (("xx", "gram"), ("xx", "kfac_a"), ("x", "mean"), ("|x|", "abs_mean")):
                if kind in self.what and any(key in self._sums[u] for u in uses):
                    found[f"{kind}/{name}"] = self._joined(uses, key, self.rows, table)
            if any("gg" in self._sums[u] for u in uses):
                found[f"kfac_g/{name}"] = self._joined(uses, "gg", self.rows_back, False)
            if len(uses) == 1 and "y" in self._sums[uses[0]]:
                found |= self._of_outputs(name, self._sums[uses[0]], self.rows[uses[0]])
        return found

    def _of_outputs(self, name: str, sums: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
        mean, found = sums["y"] / n, {}
        if "out_mean" in self.what:
            found[f"out_mean/{name}"] = mean
        square = sums.get("yy")
        if square is not None and "cov" in self.what:
            found[f"cov/{name}"] = square / n - torch.outer(mean, mean)
        if square is not None and "out_var" in self.what:
            second = (square.diagonal() if square.dim() == 2 else square) / n
            found[f"out_var/{name}"] = (second - mean.square()).clamp(min=0)
        return found

    def _joined(self, uses: Sequence[Use], key: str, rows: Mapping[Use, int], table: bool) -> Tensor:
        """One statistic of a parameter from those of its uses: [*s], or [blocks, *s]; zero where never used."""
        some = next(self._sums[u][key] for u in uses if key in self._sums[u])
        if table:
            total = torch.zeros(uses[0].of, dtype=torch.float64, device=some.device)
            for use in uses:
                total[use.first : use.first + use.rows] += self._sums[use].get(key, 0.0)
            return total / max(1, sum(rows[u] for u in uses))
        if uses[0].scale or some.shape[0] > 1:  # groups of a convolution are blocks already
            held = torch.stack([self._sums[u][key] for u in uses if key in self._sums[u]]).sum(0)
            held /= max(1, sum(rows.get(u, 0) for u in uses))
            return held[0] if uses[0].scale else held
        size = block_rows(uses)
        sums = some.new_zeros(uses[0].of // size, *some.shape[1:])
        counts = some.new_zeros(uses[0].of // size)
        for use in uses:
            if key in self._sums[use]:
                blocks = slice(use.first // size, (use.first + use.rows) // size)
                sums[blocks] += self._sums[use][key]
                counts[blocks] += rows[use]
        means = sums / counts.clamp(min=1).reshape(-1, *[1] * (sums.dim() - 1))
        return means[0] if len(means) == 1 else means


def _chunks(x: Tensor, dtype: torch.dtype) -> Iterable[Tensor]:
    """x [b, n, d] a few rows at a time, widened."""
    step = max(1, CHUNK // max(1, x.shape[0] * x.shape[2]))
    for start in range(0, x.shape[1], step):
        yield x[:, start : start + step].to(dtype)


def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
    sums[key] = sums[key].add_(value) if key in sums else value


def _refuse_nonfinite(use: Use, x: Tensor, which: str) -> None:
    if not bool(x.isfinite().all()):
        raise DataError(
            f"the {which} of the layer with {use.name!r} have NaN or infinite values: measure in a wider dtype, or "
            f"look at the data"
        )
