"""Contenders that are no method of the registry: learned, routed, calibrated."""

from __future__ import annotations

from weft.bench.contenders import Contender

ADAPTED: tuple[Contender, ...] = ()
