"""Section 2.3.2: models of several modalities."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("S33", "JAM (Uniform, Width, Cross)", "2.3.2.1", "training", "Aiello et al., ICLR 2024",
           "Joins a text and an image generator by averaging, widening or cross-attention, then trains on."),
    System("S34", "NaiveMC / DAMC", "2.3.2.1", "merge", "Chen et al., ACL 2024, arXiv:2402.12750",
           "Composes multimodal models of one language model by merging their adapters."),
    System("S35", "VL-Merging study", "2.3.2.1", "study",
           "Sung et al., EMNLP Findings 2023, arXiv:2304.14933",
           "Which seeds, mergers and distances make vision and language transformers mergeable."),
    System("S36", "UnIVAL", "2.3.2.1", "training", "Shukor et al., TMLR 2023, arXiv:2307.16184",
           "One model for images, video, audio and text whose task-tuned weights are averaged."),
    System("S37", "MAM and Learnable-MAM", "2.3.2.2", "merge",
           "Sundar et al., ICASSP workshop 2024, arXiv:2312.14378",
           "Lends the attention of a model of one modality to another's, by a fixed or learned share."),
)  # fmt: skip
