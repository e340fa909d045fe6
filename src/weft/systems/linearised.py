"""Section 2.2.2.1: fine-tuning in (part of) the tangent space, so that task vectors add up better."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("M04", "Tangent Task Arithmetic", "2.2.2.1", "training",
           "Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827",
           "Fine-tunes the first-order expansion of the network around its weights, then adds task vectors."),
    System("M05", "L-LoRA", "2.2.2.1", "training", "Tang et al., ICLR 2024, arXiv:2310.04742",
           "Linearises the adapters only, and merges them."),
    System("M06", "Linear-layers-only FT", "2.2.2.1", "training", "Jin et al., 2024, arXiv:2407.07089",
           "Fine-tunes the linear layers of attention only; task vectors then interfere less."),
    System("M07", "TAFT", "2.2.2.1", "training", "Liu et al., ICLR 2024",
           "Tangent transformers: a forward-mode derivative through every block, trained linearly."),
)  # fmt: skip
