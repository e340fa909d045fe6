"""Gates: modules from evidence to scores [.., T]. What becomes of scores is `Gating`'s."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.errors import UsageError
from weft.routing.gating import Gating


class Router(nn.Module):
    """A linear map, or a network with ReLU, from features or a preference [.., d] to scores; to be trained.

    With `normed` scores are g Ŵ LN(x), rows of W layer-normalised, g learned from `spread` up (SMEAR); no bias.
    Features of deep layers differ much in size, so `shift` and `size` [d] standardise them once they are measured.
    """

    def __init__(self, inputs: int, experts: int, how: Gating) -> None:
        super().__init__()
        self.normed, self.shifts = how.normed, how.bias
        widths = [inputs, *[how.width or 2 * inputs] * how.hidden, experts]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=how.bias and not how.normed) for a, b in pairwise(widths)
        )
        self.register_buffer("shift", torch.zeros(inputs))
        self.register_buffer("size", torch.ones(inputs))
        self.gain = nn.Parameter(torch.tensor(how.spread)) if how.normed else None
        generator = torch.Generator().manual_seed(how.seed)
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                layer.weight.normal_(0, 1.0 if how.normed else how.spread, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
            last = self.layers[-1]
            assert isinstance(last, nn.Linear)
            if last.bias is not None:
                last.bias.fill_(how.start)

    def forward(self, x: Tensor) -> Tensor:
        x = (x.to(self._size.dtype) - self._shift) / self._size
        if self.normed:
            x = F.layer_norm(x, x.shape[-1:])
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            w = F.layer_norm(layer.weight, layer.weight.shape[-1:]) if self.normed else layer.weight
            x = F.linear(x, w, layer.bias)
            if i + 1 < len(self.layers):
                x = x.relu()
        return x if self.gain is None else self.gain * x

    @property
    def _shift(self) -> Tensor:
        found: Tensor = self.get_buffer("shift")
        return found

    @property
    def _size(self) -> Tensor:
        found: Tensor = self.get_buffer("size")
        return found

    def standardise(self, features: Tensor) -> None:
        """Set shift and size from features [n, d]; dimensions that never vary stay as they are."""
        spread = features.std(0, correction=0)
        with torch.no_grad():
            if self.shifts:
                self._shift.copy_(features.mean(0))
            self._size.copy_(torch.where(spread > 1e-6, spread, 1.0))


class Prototypes(nn.Module):
    """cos(x, μₜ): features [.., d] against one mean a task, [T, d]."""

    def __init__(self, centres: Tensor) -> None:
        super().__init__()
        self.register_buffer("centres", F.normalize(centres.float(), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1) @ self.get_buffer("centres").T


class Directions(nn.Module):
    """Right singular directions of every expert's residual, [T, r, d] (rows of zeros where it has fewer).

    energy: ‖Vₜᵀx‖ (SMILE, arXiv:2408.10174). residue: −‖z − VₜVₜᵀz‖ (MASS). Both follow from the weights alone.
    """

    def __init__(self, rows: Tensor, residue: bool) -> None:
        super().__init__()
        self.residue = residue
        self.register_buffer("rows", rows.float())

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        inside = torch.einsum("trd,...d->...tr", self.get_buffer("rows"), x).square().sum(-1)
        if not self.residue:
            return inside.sqrt()
        # ‖z − VVᵀz‖² = ‖z‖² − ‖Vᵀz‖², V orthonormal
        return -(x.square().sum(-1, keepdim=True) - inside).clamp_min(0).sqrt()


def entropies(outputs: Sequence[Tensor]) -> Tensor:
    """−H of each expert's output: T of [B, …, C] → [B, T], the mean over positions."""
    found = []
    for out in outputs:
        logs = out.float().log_softmax(-1)
        h = -(logs.exp() * logs).sum(-1)
        found.append(-h.reshape(len(h), -1).mean(1))
    return torch.stack(found, -1)


def pooled(x: Tensor, channels: int, mask: Tensor | None = None) -> Tensor:
    """Features [B, d] of x [B, …]: the mean over all axes but the first and that of the channels.

    With a mask [B, L] of the positions of x [B, L, d] it is the mean over those that count.
    """
    if not x.is_floating_point():
        raise UsageError(
            "the gate would look at numbers of tokens: say where the model has features (at=…, or other blocks)"
        )
    if x.dim() < 2:
        return x[:, None]
    x = x.movedim(channels, -1)
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        counted = mask.to(x)[..., None]
        return (x * counted).sum(1) / counted.sum(1).clamp_min(1)
    return x.reshape(len(x), -1, x.shape[-1]).mean(1)
