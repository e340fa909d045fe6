"""Section 2.2.2.2: models of different shapes or origins are made alike before they are merged."""

from __future__ import annotations

from weft.systems import System

TRANSFORM = "tests/systems/test_transform.py::"

SYSTEMS = (
    System("M08", "GAN Cocktail", "2.2.2.2", "training", "Avrahami et al., ECCV 2022",
           "Teaches a copy of one generator what the others generate, averages, and tunes on generated data.",
           aliases=("S38",), entry="weft.transform.cocktail:cocktail",
           test=TRANSFORM + "test_a_cocktail_of_generators_covers_what_each_made"),
    System("M09", "FuseLLM", "2.2.2.2", "training", "Wan et al., ICLR 2024, arXiv:2401.10491",
           "Distils the fused token distributions of several language models into one.", aliases=("S28",),
           entry="weft.transform.fuse:fusellm",
           test=TRANSFORM + "test_a_language_model_learns_more_from_another_than_from_the_text_alone"),
    System("M10", "FuseChat / VaRM (/SCE)", "2.2.2.2", "training", "Wan et al., 2024, arXiv:2402.16107",
           "Distils every source into one architecture, then merges by the size of the updates (varm, sce).",
           aliases=("S29", "SCE"), entry="weft.transform.fuse:fusechat",
           test=TRANSFORM + "test_chats_taught_by_several_merge_by_how_far_they_moved"),
    System("M11", "CLAFusion", "2.2.2.2", "alignment", "Nguyen et al., 2021, arXiv:2110.15538",
           "Maps layers of networks of different depth onto each other before fusing them by transport.",
           entry="weft.transform.heterogeneous:cla_fusion",
           test=TRANSFORM + "test_networks_of_other_depth_and_width_fuse_without_training"),
)  # fmt: skip
