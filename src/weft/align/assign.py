"""The linear assignment problem, from scipy."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import DataError, MissingExtra


def assigned(score: Tensor) -> Tensor:
    """π that maximises Σᵢ score[i, π(i)]: int64 `[n]`. DataError for scores that are NaN or infinite."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("scipy", "align", "matching units") from None

    values = score.detach().cpu().double().numpy()
    try:
        _, columns = linear_sum_assignment(values, maximize=True)
    except ValueError:  # what it says of NaN and infinities
        raise DataError("units cannot be matched: their scores are NaN or infinite") from None
    return torch.as_tensor(columns, dtype=torch.int64)
