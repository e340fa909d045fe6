"""The neural tangent kernel at a model: how it fits the labels, how two models' kernels agree, where its
eigenfunctions live.

    k(x, x') = (1/C) Σ_c ∇f_c(x; θ)ᵀ ∇f_c(x'; θ)                        (Jacot et al., arXiv:1806.07572)
    alignment ⟨K̄, Ȳ⟩ / ‖K̄‖‖Ȳ‖ with Ȳ the centred kernel of the labels (or of another model)
    E_ρ = Σ_{x∈D_t} φ_ρ(x)², the energy of eigenvector ρ of K on D_t ∪ D_control (Ortiz-Jimenez et al.,
    arXiv:2305.12827): near 0 and 1 the eigenfunctions are local to one of the two, which suffices for
    disentanglement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Network, State, exact_attention
from weft.api import Model
from weft.errors import UsageError


@dataclass(frozen=True)
class Localisation(Finding):
    """Eigenvalues of the kernel, falling, and the energy of each eigenvector on the task's examples."""

    task: str
    control: str
    eigenvalues: tuple[float, ...]
    energy: tuple[float, ...]
    share: float
    """n_t / n: the energy of a vector that is spread evenly."""
    alignment: tuple[float | None, float | None]
    """Centred kernel–label alignment on task and control; None without classes."""

    about: ClassVar[str] = (
        "Energy on the task's inputs of every eigenvector of the tangent kernel over task and control "
        "(arXiv:2305.12827). Energies near 0 and 1 mean that what is learned on one set leaves the other alone."
    )

    @property
    def title(self) -> str:
        return f"Tangent-kernel localisation: {self.task} against {self.control}"

    @property
    def localisation(self) -> float:
        """Σ λ_ρ |E_ρ − share| / Σ λ_ρ max(share, 1 − share): 0 where evenly spread, 1 for blocks of equal size."""
        top = max(self.share, 1 - self.share)
        whole = sum(self.eigenvalues) * top
        weighted = sum(v * abs(e - self.share) for v, e in zip(self.eigenvalues, self.energy, strict=True))
        return weighted / whole if whole else 0.0

    @property
    def headline(self) -> str:
        told = f"eigenvalue-weighted localisation {self.localisation:.4f} (0 even, 1 local)"
        known = [
            f"{n} {a:.4f}"
            for n, a in zip((self.task, self.control), self.alignment, strict=True)
            if a is not None
        ]
        return told + (f"; alignment with the labels: {', '.join(known)}" if known else "")

    def plot(self) -> Any:
        made = figure("eigenvalue", f"energy on {self.task}")
        made.add_trace(graphs().Scatter(x=self.eigenvalues, y=self.energy, mode="markers",
                                        marker={"size": 7, "opacity": 0.7}))  # fmt: skip
        made.add_hline(y=self.share, line_dash="dot", line_color="#7f8794")
        made.update_xaxes(type="log", autorange="reversed", dtick=1, exponentformat="power")
        made.update_yaxes(range=[-0.03, 1.03])
        return made

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"localisation": self.localisation}


def ntk_localisation(
    task: Network, control: Network, model: Model, *, names: tuple[str, str] = ("task", "control")
) -> Localisation:
    """Where the eigenvectors of the kernel at `model` live. Costs n² memory."""
    state = task.state(model)
    joined = task.on([*task.batches, *control.batches])
    kernel = tangent_kernel(joined, state)
    values, vectors = torch.linalg.eigh(kernel)
    n = len(task.targets)
    energy = vectors[:n].square().sum(0)
    parts = (kernel[:n, :n], task.targets), (kernel[n:, n:], control.targets)
    aligned = [_label_alignment(k, y) for k, y in parts]
    return Localisation(
        *names, tuple(values.flip(0).clamp(min=0).tolist()), tuple(energy.flip(0).tolist()), n / len(kernel),
        (aligned[0], aligned[1]),
    )  # fmt: skip


def tangent_kernel(net: Network, state: State) -> Tensor:
    """K, [n, n] float64: the kernel of all the data, the mean over outputs.

    The outputs must be [n, C]. Gradients of one output are in memory at a time: n times the parameters.
    """
    parameters, rest = net.split(state)
    inputs = [i for i, _ in net.batches]
    if not all(isinstance(i, Tensor) for i in inputs):
        raise UsageError("the tangent kernel needs inputs of one tensor")
    outputs = net.outputs(state)
    if outputs.dim() != 2:
        raise UsageError(f"the tangent kernel needs outputs [n, C], not {list(outputs.shape)}")
    everything = torch.cat(inputs)

    def output(p: State, x: Tensor, c: Tensor) -> Tensor:
        return net.call({**rest, **p}, x[None])[0].index_select(0, c[None])[0]

    per_example = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0, None))
    kernel = torch.zeros(len(everything), len(everything), dtype=torch.float64)
    with exact_attention():
        for c in range(outputs.shape[1]):
            for jacobian in per_example(parameters, everything, torch.tensor(c, device=net.device)).values():
                rows = jacobian.flatten(1).double().cpu()
                kernel += rows @ rows.T
    return kernel / outputs.shape[1]


def kernel_alignment(k: Tensor, other: Tensor) -> float:
    """⟨K̄, K̄'⟩ / ‖K̄‖‖K̄'‖ of two kernels [n, n], each centred: H K H with H = I − 11ᵀ/n."""
    a, b = _centred(k.double()), _centred(other.double())
    lengths = float(a.norm() * b.norm())
    return float((a * b).sum()) / lengths if lengths else 0.0


def _centred(k: Tensor) -> Tensor:
    return k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()


def _label_alignment(kernel: Tensor, targets: Tensor) -> float | None:
    if targets.is_floating_point() or targets.dim() != 1:
        return None
    labels = one_hot(targets - targets.min()).double().cpu()
    return kernel_alignment(kernel, labels @ labels.T)
