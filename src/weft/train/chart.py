"""Charts: what is trained, φ, and which weights θ(φ) it stands for.

A chart has a start φ0 with θ(φ0) = θ0 and an inverse, so that weights that were merged can be trained on. Plain
fine-tuning, low-rank adapters and the common model of several runs are charts of the same network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from weft.errors import DataProblems


class Chart(Protocol):
    """φ → the weights that differ from the network's own."""

    @property
    def start(self) -> Mapping[str, Tensor]:
        """φ0, by name; float32 at least."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The parameters of the network that φ moves."""
        ...

    def __call__(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """θ(φ) of `names`, float32 at least; differentiable."""
        ...

    def of(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A φ with θ(φ) = θ (the nearest there is), from values of `names`."""
        ...

    def to(self, device: torch.device | str) -> Chart:
        """The same with its constants on a device."""
        ...


def wide(tensor: Tensor) -> Tensor:
    """A copy in float32 at least: small steps on half-precision weights would be lost."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def starting(module: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """θ0 of the named parameters, copied."""
    own = dict(module.named_parameters())
    return {n: wide(own[n]) for n in names}


def fitting(theta: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of `start`'s names from θ, in its dtypes; DataProblems where they do not fit."""
    problems = [f"{n}: missing" for n in start if n not in theta] + [
        f"{n}: shape {list(theta[n].shape)}, not {list(s.shape)}"
        for n, s in start.items()
        if n in theta and theta[n].shape != s.shape
    ]
    if problems:
        raise DataProblems("these weights do not fit the module that is trained", problems)
    return {n: theta[n].detach().to(s, copy=True) for n, s in start.items()}


class Direct:
    """θ = φ: the parameters themselves."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self.start = starting(module, names)

    def __call__(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(phi)

    def of(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fitting(theta, self.start)

    def to(self, device: torch.device | str) -> Direct:
        self.start = {n: t.to(device) for n, t in self.start.items()}
        return self


class Shared:
    """One of T models of a common mean: θ = θ0 + (Σ_s τ_s + φ − θ0) / T, with the others' τ_s held.

    What is trained through the mean is how this model must be for the mean to be good (IEL, arXiv:2405.16350).
    `others` are the task vectors τ_s by parameter, each a mapping or a checkpoint's state dict; T = their
    number + 1.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], others: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.names, self.count = list(names), len(others) + 1
        self.start = starting(module, names)
        zeros = {n: torch.zeros_like(t) for n, t in self.start.items()}
        self._rest = {
            n: torch.stack([zeros[n], *(fitting(o, zeros)[n] for o in others)]).sum(0) for n in self.names
        }

    def __call__(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: self.start[n] + (self._rest[n] + phi[n] - self.start[n]) / self.count for n in self.names}

    def of(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = fitting(theta, self.start)
        return {n: self.start[n] + (given[n] - self.start[n]) * self.count - self._rest[n] for n in given}

    def to(self, device: torch.device | str) -> Shared:
        self.start = {n: t.to(device) for n, t in self.start.items()}
        self._rest = {n: t.to(device) for n, t in self._rest.items()}
        return self
