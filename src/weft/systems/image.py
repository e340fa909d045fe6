"""Section 2.3.3: image generators."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("S38", "GAN Cocktail", "2.3.3.1", "training", "Avrahami et al., ECCV 2022",
           "Merges generators without their data: rooting, averaging, tuning on generated images.",
           entry="weft.transform.cocktail:cocktail",
           test="tests/systems/test_transform.py::test_a_cocktail_of_generators_covers_what_each_made"),
    System("S39", "Diffusion Soup", "2.3.3.1", "merge", "Biggs et al., ECCV 2024, arXiv:2406.08431",
           "Averages diffusion models tuned on shards of data; a shard is removed by averaging anew."),
    System("S40", "MaxFusion", "2.3.3.1", "inference", "Nair et al., 2024, arXiv:2404.09977",
           "Fuses the features of several conditions where they vary most."),
    System("S41", "ZipLoRA", "2.3.3.1", "search", "Shah et al., 2023, arXiv:2311.13600",
           "Learns column coefficients that join a subject's and a style's LoRA."),
    System("S42", "MoLE", "2.3.3.1", "inference", "Wu et al., ICLR 2024, arXiv:2404.13628",
           "Gates the outputs of several LoRAs, layer by layer."),
    System("S43", "LCSC", "2.3.3.2", "search", "Liu et al., ICLR 2025, arXiv:2404.02241",
           "Searches signed combinations of a run's checkpoints by evolution."),
    System("S44", "SELMA", "2.3.3.3", "training", "Li et al., 2024, arXiv:2403.06952",
           "Trains a LoRA a skill on self-made data and averages them."),
)  # fmt: skip
