"""Published ways to learn coefficients, with their defaults: AdaMerging, aTLAS, SyMerge, Expert Merging.

Those that learn from the very inputs they are measured on have split="test-time" by default, as they were
published; give other inputs and another split, and they are ordinary methods that see unlabelled data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError
from weft.learn.constraints import Constraint
from weft.learn.loop import TEST_TIME, Learned, learn
from weft.learn.losses import Loss, align, distill, self_label, trusted, ufm
from weft.learn.mergeable import Mergeable
from weft.learn.parts import Parts
from weft.methods.averages import weighted_sum
from weft.methods.merge import Merge
from weft.methods.registry import pipeline_method
from weft.methods.ties import elect_sign, trim


def elected(base: Model, models: Sequence[Model], density: float = 0.2) -> list[Checkpoint]:
    """Each model with TIES's trimmed and elected task vector in place of its own, lazily (AdaMerging++)."""
    anchor, known = load(base), [load(m) for m in models]
    made: list[Checkpoint] = []
    for i in range(len(known)):
        alone = [float(j == i) for j in range(len(known))]
        steps = trim(density=density, scope="model") | elect_sign() | weighted_sum(weight=alone)
        made.append(Merge(known, base=anchor, method=pipeline_method(steps, f"elected_{i}")))
    return made


def adamerging(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    tasks: Sequence[str],
    parts: Parts = "tensor",
    plus: bool = False,
    density: float = 0.2,
    start: float = 0.3,
    constraint: str | Constraint = "box",
    steps: int = 500,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
    split: str = TEST_TIME,
    validation: Any = None,
    **how: Any,
) -> Learned:
    """min over λ of Σ_t E_x H(softmax f(x; θ0 + Σ λ_t τ_t)), x unlabelled inputs of task t (arXiv:2310.02575).

    parts="model" is task-wise, "tensor" layer-wise; `plus` first trims and elects (`elected`). λ is clamped to
    [0, 1], as in the reference. Low entropy is not accuracy: an over-confident base can pull λ to 0. `how` goes to
    `Mergeable` (private heads, norms …).
    """
    taken = elected(base, models, density) if plus else models
    merged = Mergeable(module, base, taken, parts, constraint, start=start, tasks=tasks, **how)
    return learn(
        merged, "entropy", data, steps=steps, lr=lr, batch=batch, seed=seed, split=split, validation=validation,
    )  # fmt: skip


def atlas(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    parts: Parts = "tensor",
    loss: str | Loss = "cross_entropy",
    steps: int = 200,
    lr: float = 1e-1,
    weight_decay: float = 0.1,
    batch: int = 128,
    seed: int = 0,
    split: str = "few-shot",
    validation: Any = None,
    **how: Any,
) -> Learned:
    """θ0 + Σ_t Λ_t τ_t, Λ_t one number a tensor, from 0, without bounds, on labels (arXiv:2407.02880).

    parts=Blocks(n) splits every matrix in n. Task vectors may be low-rank: models that are adapters applied to the
    base, with hold=False if only their factors are to stay in memory. AdamW with a cosine schedule; the rate is the
    paper's for few shots (1e-3 with all data). In few-shot and test-time use the target's own vector stays out.
    """
    merged = Mergeable(module, base, models, parts, start=0.0, **how)
    return learn(
        merged, loss, data, steps=steps, lr=lr, optimizer="adamw", weight_decay=weight_decay,
        schedule="cosine", batch=batch, seed=seed, split=split, validation=validation,
    )  # fmt: skip


def atlas_test_time(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    inputs: Tensor,
    strong: Callable[[Tensor], Tensor],
    *,
    parts: Parts = "tensor",
    threshold: float = 0.99,
    compat: bool = False,
    steps: int = 500,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    batch: int = 128,
    seed: int = 0,
    split: str = TEST_TIME,
    **how: Any,
) -> Learned:
    """aTLAS without labels: UFM on test inputs; `strong` is the strong view of a batch of them.

    The base's surest predictions of every class keep their label; half of every batch is of them. `compat` trusts
    all of its predictions, as the released code does.
    """
    if not isinstance(inputs, Tensor) or not len(inputs):
        raise UsageError("the test inputs must be one tensor with the examples along its first axis")
    merged = Mergeable(module, base, models, parts, start=0.0, **how)
    with torch.no_grad():
        weights, device = merged.weights(), merged.sources.device  # the base's: all coefficients are 0
        found = [merged.at(weights, (x.to(device),)).softmax(-1).cpu() for x in torch.split(inputs, 256)]
    labels = trusted(torch.cat(found), compat)
    known, rest = (labels >= 0).nonzero()[:, 0], torch.arange(len(inputs))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def some(rows: Tensor) -> Tensor:
            return rows[torch.randint(len(rows), (max(1, batch // 2),), generator=generator)]

        index = torch.cat([some(known), some(rest)])
        return inputs[index], labels[index]

    return learn(
        merged, ufm(strong, threshold), draw, steps=steps, lr=lr, optimizer="adamw", weight_decay=weight_decay,
        schedule="cosine", batch=batch, seed=seed, split=split,
    )  # fmt: skip


def symerge(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    tasks: Sequence[str],
    layer: Sequence[str],
    parts: Parts = "tensor",
    threshold: float = 0.0,
    start: float = 0.3,
    steps: int = 500,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
    split: str = TEST_TIME,
    validation: Any = None,
    **how: Any,
) -> Learned:
    """Coefficients and one layer of every task together, on what the task's own model is sure of (SyMerge, 2026).

    `layer`: patterns of the parameters that each task keeps, from its own model on; no labels. Written from the
    paper's summary; its schedule is not known here. Take `checkpoint(task)` for a task's model.
    """
    merged = Mergeable(
        module, base, models, parts, start=start, tasks=tasks, private=layer, train_private=True, **how
    )
    return learn(
        merged, self_label(threshold), data, steps=steps, lr=lr, batch=batch, seed=seed, split=split,
        validation=validation,
    )  # fmt: skip


def expert_merging(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    tasks: Sequence[str],
    layers: Sequence[str] = (),
    parts: Parts = "layer",
    align_to: Literal["both", "logits", "hidden"] = "both",
    start: float = 0.3,
    steps: int = 300,
    lr: float = 1e-2,
    batch: int = 16,
    seed: int = 0,
    split: str = "unlabelled",
    validation: Any = None,
    **how: Any,
) -> Learned:
    """Coefficients by layer that bring hidden states and outputs near each expert's on its own inputs.

    `layers` are the submodules whose output is aligned.
    """
    if align_to not in ("both", "logits", "hidden"):
        raise UsageError(f"align_to must be both, logits or hidden, not {align_to!r}")
    if align_to != "logits" and not layers:
        raise UsageError("say which layers' outputs to align (layers=…), or align_to='logits'")
    loss = align(() if align_to == "logits" else layers, logits=0.0 if align_to == "hidden" else 1.0)
    merged = Mergeable(module, base, models, parts, start=start, tasks=tasks, **how)
    return learn(
        merged, loss, data, steps=steps, lr=lr, batch=batch, seed=seed, split=split, validation=validation,
    )  # fmt: skip


def dam(
    module: nn.Module,
    models: Sequence[Model],
    data: Any,
    *,
    tasks: Sequence[str],
    temperature: float = 1.0,
    steps: int = 300,
    lr: float = 1e-2,
    batch: int = 16,
    seed: int = 0,
    split: str = "unlabelled",
    validation: Any = None,
    **how: Any,
) -> Learned:
    """W = Σᵢ Wᵢ diag(cᵢ), a coefficient a model and input column, by KL to each expert on its inputs (DAM).

    Differentiable adaptive merging (arXiv:2410.08371) from equal shares, without base and without its penalties on
    the coefficients. Vectors have one coefficient a model.
    """
    merged = Mergeable(module, None, models, "column", tasks=tasks, **how)
    return learn(
        merged, distill(temperature), data, steps=steps, lr=lr, batch=batch, seed=seed, split=split,
        validation=validation,
    )  # fmt: skip
