"""Matching by activations: permutations for which the units of two models do the same on the same data.

`activation_matching` is Git Re-Basin's (arXiv:2209.04836, section 3.1), `neuron_alignment` the heuristic of Tatro
et al. (arXiv:2009.02439), which differs by centring and scaling what is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from weft.align.activations import Activations, Of, Watch, activations
from weft.align.maps import Transport, transported
from weft.align.networks import Net, comparable, opened
from weft.align.solving import permutations as solved
from weft.align.spec import PermutationSpec
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Affine
from weft.errors import UsageError
from weft.statistics.batches import Data, Forward


@dataclass(frozen=True)
class Alignment:
    """How the units of `source` come to stand where those of `target` do."""

    target: Net
    source: Net
    permutations: dict[str, Tensor] = field(default_factory=dict)
    transport: Transport = field(default_factory=dict)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The source in the target's order of units (and of its widths): a lazy checkpoint."""
        return transported(self.source, self.permutations, self.transport)

    def merged(self, weight: float = 0.5) -> Checkpoint:
        """(1 − weight) · target + weight · source, aligned: a lazy checkpoint."""
        if not 0 <= weight <= 1:
            raise UsageError(f"weight must lie between 0 and 1, not {weight}")
        return Affine([(1 - weight, self.target.checkpoint), (weight, self.checkpoint)])


def activation_matching(
    model: Model, to: Model, data: Data, *, module: nn.Module | None = None, spec: PermutationSpec | None = None,
    of: Of = "moment", watch: Watch = "read", samples: int | None = None, forward: Forward | None = None,
) -> Alignment:  # fmt: skip
    """Permutes `model` so that its activations agree with those of `to`: max_P ⟨P, Σ_x a(x) b(x)ᵀ⟩ for every group.

    Models are modules, or weights of `module`. `of="moment"` compares activations as they are, as the paper's code
    does; "correlation" centres and scales them. No labels are used.
    """
    return by_activations(model, to, data, "activation matching", of, module, spec, watch, samples, forward)


def neuron_alignment(
    model: Model, to: Model, data: Data, *, module: nn.Module | None = None, spec: PermutationSpec | None = None,
    watch: Watch = "read", samples: int | None = None, forward: Forward | None = None,
) -> Alignment:  # fmt: skip
    """Permutes `model` so that its units correlate most with those of `to` (Pearson; dead units come last).

    The paper then trains a curve between the two, `weft.analyze` with `curve`.
    """
    return by_activations(
        model, to, data, "neuron alignment", "correlation", module, spec, watch, samples, forward
    )


def by_activations(
    model: Model, to: Model, data: Data, what: str, of: Of, module: Any, spec: PermutationSpec | None, watch: Watch,
    samples: int | None, forward: Forward | None,
) -> Alignment:  # fmt: skip
    target, source = opened([to, model], data, module=module, spec=spec, forward=forward)
    comparable([target, source], same_size=what)
    found = activations([target, source], data, watch=watch, samples=samples)
    return Alignment(target, source, matched(found, of))


def matched(
    found: Activations, of: Of, i: int = 0, j: int = 1, groups: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The permutations of model j that bring it to model i."""
    return solved(found.nets[i].spec, lambda group: found.cross(group, i, j, of), groups)
