"""`LowRank`: LoRA as a chart, W = W0 + s·B A, without a wrapper in the network; written as PEFT reads it.

Three starts for A: drawn, one of several orthogonal subspaces, or away from what other tasks' inputs span.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError
from weft.methods.random import stream_key
from weft.train.chart import fitting, starting
from weft.train.select import is_conv1d

if TYPE_CHECKING:
    from weft.adapters.output import AdapterCheckpoint

Grams = Mapping[str, Tensor] | Checkpoint
ROW = 1 / math.sqrt(3.0)
"""Length of a row of A0 in expectation, as LoRA's usual uniform start has it; all starts share this scale."""


class LowRank:
    """θ_W = W0 + s·B A for each named weight; A [r, in], B [out, r], s = alpha / r (arXiv:2106.09685).

    A0 depends on `seed` and the weight's name alone, so models that are to be merged share it; B0 = 0.
    `train_a=False` keeps A at A0: then θ is linear in φ = B, the module-wise linearised LoRA of
    arXiv:2310.04742. Kernels are flattened to `[out, in·kh·kw]`.

    `subspace=(i, n)` gives A0 the i-th of n sets of orthonormal rows, so that updates of n tasks with A held
    have orthogonal row spaces: ΔW_i ΔW_jᵀ = 0. `away` holds Gram matrices of inputs of other tasks (weight →
    [in, in], or a checkpoint of statistics with `gram/<weight>`): A0 is then their r eigenvectors of least
    eigenvalue, so that A0 x ≈ 0 on those tasks (OSRM, arXiv:2505.22934).
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        *,
        rank: int = 16,
        alpha: float | None = None,
        seed: int = 0,
        train_a: bool = True,
        subspace: tuple[int, int] | None = None,
        away: Grams | None = None,
    ) -> None:
        self.names, self.rank, self.train_a = list(names), rank, train_a
        self.scale = (rank if alpha is None else alpha) / rank if rank > 0 else 0.0
        self._w0 = starting(module, names)
        self._turned = {
            n
            for n in names
            if n.endswith(".weight") and is_conv1d(module.get_submodule(n[: -len(".weight")]))
        }
        self._check(subspace, away)
        a0 = {}
        for name, w in self._w0.items():
            side = self._dims(name)[1]
            if away is not None:
                rows = _quietest(_gram(away, name, side), rank)
            elif subspace is not None:
                rows = _orthonormal(side, stream_key(seed, 0, name))[subspace[0] * rank :][:rank]
            else:
                rows = _uniform(rank, side, stream_key(seed, 0, name)) / ROW
            a0[name] = (rows * ROW).to(w)
        b0 = {n: w.new_zeros(self._dims(n)[0], rank) for n, w in self._w0.items()}
        self._a0 = a0
        self.start = {f"{n}:B": b for n, b in b0.items()}
        if train_a:
            self.start |= {f"{n}:A": a.clone() for n, a in a0.items()}

    def _check(self, subspace: tuple[int, int] | None, away: Grams | None) -> None:
        if self.rank < 1:
            raise UsageError(f"rank must be 1 or more, not {self.rank}")
        if subspace is not None and away is not None:
            raise UsageError("subspace= and away= both choose the start of A: give one of them")
        problems = [f"{n}: no matrix" for n, w in self._w0.items() if w.dim() < 2]
        if subspace is not None and not 0 <= subspace[0] < subspace[1]:
            raise UsageError(f"subspace={subspace}: the first number counts from 0 to one below the second")
        need = self.rank * (subspace[1] if subspace else 1)
        problems += [
            f"{n}: {self._dims(n)[1]} inputs, where {need} are needed"
            for n, w in self._w0.items()
            if w.dim() > 1 and (subspace or away is not None) and self._dims(n)[1] < need
        ]
        if problems:
            raise DataProblems("low-rank updates of these weights cannot be made", problems)

    def _dims(self, name: str) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        w = self._w0[name]
        out, side = w.shape[0], w.shape[1:].numel()
        return (side, out) if name in self._turned else (out, side)

    def factors(self, name: str, phi: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, A) of one weight."""
        return phi[f"{name}:B"], phi.get(f"{name}:A", self._a0[name])

    def __call__(self, phi: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, w in self._w0.items():
            b, a = self.factors(name, phi)
            delta = b @ a
            made[name] = w + self.scale * (delta.T if name in self._turned else delta).reshape(w.shape)
        return made

    def of(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors of θ − θ0: by least squares for a held A, else by its singular vectors, √σ to each side."""
        given, phi = fitting(theta, self._w0), {}
        for name, w in given.items():
            stored = ((w - self._w0[name]) / self.scale).double()
            delta = stored.T if name in self._turned else stored.flatten(1)
            if self.train_a:
                u, s, v = torch.linalg.svd(delta, full_matrices=False)
                u, s, v = u[:, : self.rank], s[: self.rank].sqrt(), v[: self.rank]
                short = self.rank - len(s)
                phi[f"{name}:A"] = nn.functional.pad(s[:, None] * v, (0, 0, 0, short)).to(w)
                phi[f"{name}:B"] = nn.functional.pad(u * s, (0, short)).to(w)
            else:
                phi[f"{name}:B"] = (delta @ torch.linalg.pinv(self._a0[name].double())).to(w)
        return {n: phi[n] for n in self.start}

    def to(self, device: torch.device | str) -> LowRank:
        self.start = {n: t.to(device) for n, t in self.start.items()}
        self._w0 = {n: t.to(device) for n, t in self._w0.items()}
        self._a0 = {n: t.to(device) for n, t in self._a0.items()}
        return self

    def adapter(self, phi: Mapping[str, Tensor], base_name: str | None = None) -> AdapterCheckpoint:
        """The update as an adapter checkpoint in float32, the scale folded into B. It holds copies."""
        from weft.adapters.factors import Factors
        from weft.adapters.output import Slot, adapter_checkpoint

        strange = [n for n in self.names if not n.endswith(".weight")]
        if strange:
            raise UsageError(
                f"adapters hold updates of modules' weights, not of {', '.join(strange)}: save the whole "
                "weights instead, or choose other parameters"
            )
        made, slots = {}, {}
        for name, w in self._w0.items():
            b, a = (t.detach().double().cpu() for t in self.factors(name, phi))
            turned = name in self._turned
            made[name] = Factors(self.scale * b, a.clone(), tuple(w.shape), turned)
            out, side = self._dims(name)
            kernel = w.dim() > 2 and not turned
            slots[name] = Slot(self.rank, tuple(w.shape) if kernel else (out, side), torch.float32, turned)
        return adapter_checkpoint(slots, made.__getitem__, origin="fine-tuned adapter", base_name=base_name)


def _drawn(key: tuple[int, int]) -> torch.Generator:
    return torch.Generator().manual_seed(key[0] << 31 ^ key[1])


def _uniform(rank: int, side: int, key: tuple[int, int]) -> Tensor:
    """Uniform in ±1/√in, rows of length 1/√3 on average; float32."""
    return (2 * torch.rand(rank, side, generator=_drawn(key)) - 1) / math.sqrt(side)


def _orthonormal(side: int, key: tuple[int, int]) -> Tensor:
    """A random orthogonal matrix [in, in]; float32."""
    q, r = torch.linalg.qr(torch.randn(side, side, generator=_drawn(key), dtype=torch.float64))
    signs: Tensor = r.diagonal().sign()
    turned: Tensor = (q * signs).T
    return turned.float()


def _quietest(gram: Tensor, rank: int) -> Tensor:
    """The `rank` orthonormal directions [rank, in] in which the inputs have least energy."""
    directions: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return directions[:, :rank].T


def _gram(grams: Grams, name: str, side: int) -> Tensor:
    if isinstance(grams, Checkpoint):
        gram = grams.tensor(f"gram/{name}")
    elif name in grams:
        gram = grams[name]
    else:
        raise UsageError(f"away= has no Gram matrix of the inputs of {name}: measure it on the other tasks")
    if gram.shape != (side, side):
        raise UsageError(f"away=: the Gram matrix of {name} is {list(gram.shape)}, not [{side}, {side}]")
    if not bool(gram.isfinite().all()):
        raise UsageError(f"away=: the Gram matrix of {name} has values that are not finite")
    return gram
