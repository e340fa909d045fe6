"""`InCompany`: the same tensors with another config, or with other files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DType
from weft.checkpoints.lazy import Derived
from weft.late import Tensor, torch


class InCompany(Derived):
    """`source` with `config` and `assets` in place of its own; None keeps its own."""

    def __init__(
        self,
        source: Checkpoint,
        config: Mapping[str, Any] | None = None,
        assets: tuple[Asset, ...] | None = None,
    ) -> None:
        super().__init__(source)
        self.origin = source.origin
        self._config, self._assets = config, assets

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.first.config if self._config is None else self._config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self.first.assets if self._assets is None else self._assets

    def at_hand(self, name: str) -> bool:
        return self.first.at_hand(name)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.first.read(name, start, stop, dtype=dtype)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        return self.first.bits(name, start, stop, dtype=dtype)


def asset(name: str, data: bytes) -> Asset:
    """A file that travels with the weights, from memory."""
    return Asset(name, partial(bytes, data))
