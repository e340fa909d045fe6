"""Weight space as a vector space: mixtures of states, their inner products, directions and distances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from weft.analysis.network import State
from weft.errors import UsageError


def affine(coefficients: Sequence[float], states: Sequence[State]) -> State:
    """Σ cᵢθᵢ in float64, rounded once to the stored dtype; integers and bools are the first state's.

    Terms of coefficient 0 are left out, so that 1·θ is θ to the last bit.
    """
    if len(coefficients) != len(states):
        raise UsageError(f"there are {len(coefficients)} coefficients for {len(states)} models")
    terms = [(c, s) for c, s in zip(coefficients, states, strict=True) if c != 0]
    made: State = {}
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            made[name] = tensor
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for c, state in terms:
            total = total + c * state[name].double()
        made[name] = total.to(tensor.dtype)
    return made


def between(a: State, b: State, alpha: float) -> State:
    """(1 − α) θa + α θb."""
    return affine([1.0 - alpha, alpha], [a, b])


def mean(states: Sequence[State]) -> State:
    return affine([1.0 / len(states)] * len(states), states)


def flat(state: State, names: Iterable[str]) -> Tensor:
    """The named tensors as one vector, float64."""
    return torch.cat([state[n].reshape(-1).double() for n in names])


def shaped(vector: Tensor, like: State, names: Sequence[str]) -> State:
    """A vector as the named tensors in the shapes and dtypes of `like`; inverse of `flat`."""
    parts = torch.split(vector, [like[n].numel() for n in names])
    return {n: p.reshape(like[n].shape).to(like[n].dtype) for n, p in zip(names, parts, strict=True)}


def at(vector: Tensor, like: State, names: Sequence[str]) -> State:
    """The state `like` with the named tensors taken from a vector."""
    return {**like, **shaped(vector, like, names)}


def normal(state: State, names: Iterable[str], seed: int) -> State:
    """Independent standard normal numbers for the named tensors; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(state[n].shape, generator=generator).to(state[n].device, state[n].dtype) for n in names
    }


def filter_normalised(direction: State, state: State) -> State:
    """δ with every filter rescaled to the norm of the weights' filter: δᵢ ← δᵢ ‖θᵢ‖ / ‖δᵢ‖ (arXiv:1712.09913).

    A filter is a row of a tensor's first axis; vectors (biases, norms) are set to zero, as in the paper.
    """
    made: State = {}
    for name, d in direction.items():
        if d.dim() < 2:
            made[name] = torch.zeros_like(d)
            continue
        axes = tuple(range(1, d.dim()))
        length = torch.linalg.vector_norm(d, dim=axes, keepdim=True)
        wanted = torch.linalg.vector_norm(state[name], dim=axes, keepdim=True)
        made[name] = d * torch.where(length > 0, wanted / length, 0.0)
    return made


def gram_of_states(states: Sequence[State], names: Iterable[str]) -> Tensor:
    """⟨θᵢ, θⱼ⟩ over the named tensors, [k, k] float64."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for n in names:
        x = torch.stack([s[n].reshape(-1).double() for s in states])
        total += (x @ x.T).cpu()
    return total
