"""Section 2.2.2.2: models of different shapes or origins are made alike before they are merged."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("M08", "GAN Cocktail", "2.2.2.2", "training", "Avrahami et al., ECCV 2022",
           "Teaches a copy of one generator what the others generate, averages, and tunes on generated data.",
           aliases=("S38",)),
    System("M09", "FuseLLM", "2.2.2.2", "training", "Wan et al., ICLR 2024, arXiv:2401.10491",
           "Distils the fused token distributions of several language models into one.", aliases=("S28",)),
    System("M10", "FuseChat / VaRM (/SCE)", "2.2.2.2", "training", "Wan et al., 2024, arXiv:2402.16107",
           "Distils every source into one architecture, then merges by the size of the updates. "
           "Its merger is weft.sce; the distillation is missing.", aliases=("S29", "SCE")),
    System("M11", "CLAFusion", "2.2.2.2", "alignment", "Nguyen et al., 2021, arXiv:2110.15538",
           "Maps layers of networks of different depth onto each other before fusing them by transport."),
)  # fmt: skip
