"""Matchings by activations and transport as `weft.align(b, to=a, how=…, data=…)` takes them: `(spec, a, b, …)`.

`module` runs both models; with `modules=(of a, of b)` the two may be of different widths, for transport.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from weft.align.cca import cca_merge
from weft.align.correlate import Alignment, activation_matching, neuron_alignment
from weft.align.mudsc import mudsc
from weft.align.spec import PermutationSpec
from weft.align.transport import ot_fusion, transformer_fusion
from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError

Way = Callable[..., Alignment]


def _aligned(
    way: Way, spec: PermutationSpec | None, a: Checkpoint, b: Checkpoint, module: Any, options: dict[str, Any]
) -> Checkpoint:
    if module is None:
        raise UsageError("to look at activations the network must be run: give module=")
    return way(b, a, module=module, spec=spec, **options).checkpoint


def activations(
    spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, data: Any = None, module: nn.Module | None = None,
    **options: Any,
) -> Checkpoint:  # fmt: skip
    """By activations as they are."""
    return _aligned(activation_matching, spec, a, b, module, {"data": data, **options})


def correlation(
    spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, data: Any = None, module: nn.Module | None = None,
    **options: Any,
) -> Checkpoint:  # fmt: skip
    """By correlation of activations."""
    return _aligned(neuron_alignment, spec, a, b, module, {"data": data, **options})


def both(
    spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, data: Any = None, module: nn.Module | None = None,
    **options: Any,
) -> Checkpoint:  # fmt: skip
    """By weights and activations together."""
    return _aligned(mudsc, spec, a, b, module, {"data": data, **options})


def cca(
    spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, data: Any = None, module: nn.Module | None = None,
    **options: Any,
) -> Checkpoint:  # fmt: skip
    """By canonical correlation: units are mixed."""
    return _aligned(cca_merge, spec, a, b, module, {"data": data, **options})


def transport(
    spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, data: Any = None, module: nn.Module | None = None,
    modules: tuple[nn.Module, nn.Module] | None = None, **options: Any,
) -> Checkpoint:  # fmt: skip
    """By optimal transport, of weights or (`by="activations"`) of activations."""
    given = {"data": data, **options}
    return _aligned(ot_fusion, spec if modules is None else None, a, b, modules or module, given)


def transformers(
    spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, data: Any = None, module: nn.Module | None = None,
    modules: tuple[nn.Module, nn.Module] | None = None, **options: Any,
) -> Checkpoint:  # fmt: skip
    """By soft transport of standardised activations."""
    given = {"data": data, **options}
    return _aligned(transformer_fusion, spec if modules is None else None, a, b, modules or module, given)
