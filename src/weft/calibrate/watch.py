"""What is at places of a network while it runs: behind a layer, or before it (`<name`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.adapted import INPUT
from weft.calibrate.network import hooked
from weft.errors import DataError
from weft.statistics.batches import Batch, Forward, outputs_of


def watching(net: nn.Module, places: Sequence[str], found: dict[str, Tensor]) -> Iterator[Any]:
    """Hooks that note what is at the places; registered last, they see what maps there have made."""

    def note(place: str, value: Any) -> None:
        found[place] = value[0] if isinstance(value, tuple) else value

    for place in places:
        m = net.get_submodule(place.removeprefix(INPUT))
        if place.startswith(INPUT):
            yield m.register_forward_pre_hook(lambda m, args, p=place: note(p, args))
        else:
            yield m.register_forward_hook(lambda m, args, y, p=place: note(p, y))


@torch.no_grad()
def seen_at(
    net: nn.Module, places: Sequence[str], batch: Batch, forward: Forward | None = None
) -> dict[str, Tensor]:
    """What a batch makes at the places. DataError where it does not reach one."""
    found: dict[str, Tensor] = {}
    with hooked(watching(net, places, found)):
        outputs_of(net, batch, forward)
    if any(p not in found for p in places):
        lost = ", ".join(p for p in places if p not in found)
        raise DataError(f"these data do not reach {lost}: choose other layers (at=…)")
    return {p: found[p] for p in places}
