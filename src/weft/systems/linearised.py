"""Section 2.2.2.1: fine-tuning in (part of) the tangent space, so that task vectors add up better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import weft
from weft.systems import System

if TYPE_CHECKING:
    from torch import nn

    from weft.api import Model
    from weft.checkpoints.base import Checkpoint
    from weft.train.batches import Data
    from weft.train.loop import Finetuned
    from weft.train.model import Charted, Linearised


def tangent_task_arithmetic(module: nn.Module, tuned: Sequence[Model], scale: float = 0.4) -> Linearised:
    """f(x; θ0) + ∂f/∂θ (α Σ τ_t): tangent experts added up, in the model linearised around `module`.

    `tuned`: checkpoints of `weft.finetune(module, …, mode="tangent")`. Of experts tuned otherwise this is
    post-hoc linearisation. Choose the scale on validation data.
    """
    from weft.train.stored import load_linearised

    return load_linearised(weft.merge(tuned, "task_arithmetic", base=module, scale=scale), module)


def l_lora(tuned: Sequence[Finetuned], scale: float = 0.4) -> Charted:
    """φ0 + λ Σ (φ_t − φ0) in the model that the adapters were tuned in, linear in φ; φ0 has A0 drawn and B0 = 0.

    `tuned`: results of `weft.finetune(…, mode="tangent_lora", scope=…)` with one `lora={"seed": …}`, whose A0 they
    share: the sum is then that of the updates themselves. (With mode="lora" it sums factors, which is not.)
    """
    import copy

    import torch

    merged = copy.deepcopy(tuned[0].model)
    with torch.no_grad():
        for name, start in merged.chart.start.items():
            moved = torch.stack([t.model.phi[name] - start for t in tuned]).sum(0)
            merged.phi[name].copy_(start + scale * moved)
    return merged


def linear_layers_only(module: nn.Module, data: Data, **training: Any) -> Checkpoint:
    """θ fine-tuned on one task with everything frozen but the weights of attention's linear layers.

    A network without attention takes `which="linear"`. Merge the experts by task arithmetic, as plain ones.
    """
    return weft.finetune(module, data, mode="linear_layers", **training).checkpoint


def taft(module: nn.Module, data: Data, scale: float = 15.0, **training: Any) -> Checkpoint:
    """Tangent weights of a transformer, by pairs (x, ẋ) through its layers and ‖z − κ·onehot(y)‖².

    κ is `scale`: 15 for shards of classes, 5 for shards of data. `which` chooses the last blocks, as the paper
    does. Compose shards by their mean, forget one by leaving it out, and load with `load_linearised`.
    """
    from weft.train.objectives import one_hot_squared

    settings = {"loss": one_hot_squared(scale), "weight_decay": 1e-5, **training}
    return weft.finetune(module, data, mode="tangent", tangent="closed", **settings).checkpoint


HERE = "weft.systems.linearised:"
TESTS = "tests/systems/test_finetune.py::"
LORA = "test_linearised_adapters_add_up_where_factors_do_not"

SYSTEMS = (
    System("M04", "Tangent Task Arithmetic", "2.2.2.1", "training",
           "Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827",
           "Fine-tunes the first-order expansion of the network around its weights, then adds task vectors.",
           entry=HERE + "tangent_task_arithmetic",
           test=TESTS + "test_tangent_experts_add_up_better_than_plain_ones"),
    System("M05", "L-LoRA", "2.2.2.1", "training", "Tang et al., ICLR 2024, arXiv:2310.04742",
           "Linearises the adapters only, and merges them.", entry=HERE + "l_lora", test=TESTS + LORA),
    System("M06", "Linear-layers-only FT", "2.2.2.1", "training", "Jin et al., 2024, arXiv:2407.07089",
           "Fine-tunes the linear layers of attention only; task vectors then interfere less.",
           entry=HERE + "linear_layers_only",
           test=TESTS + "test_linear_layers_of_attention_alone_learn_more_than_the_tangent_and_merge_as_all_do"),
    System("M07", "TAFT", "2.2.2.1", "training", "Liu et al., ICLR 2024, arXiv:2307.08122",
           "Tangent transformers: a forward-mode derivative through every block, trained linearly.",
           entry=HERE + "taft", test=TESTS + "test_tangent_transformers_of_shards_compose_and_forget_exactly"),
)  # fmt: skip
