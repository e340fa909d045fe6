"""Section 2.2.4: why merging works, or not."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("M61", "SWA / EMA", "2.2.4", "training", "Izmailov et al., UAI 2018, arXiv:1803.05407",
           "Running means of one training run's weights.", aliases=("S67",)),
    System("M62", "Tail-averaged SGD bound", "2.2.4", "analysis", "Jain et al., JMLR 2018, arXiv:1610.03774",
           "Excess risk of least squares by SGD whose last iterates are averaged."),
    System("M63", "SMA / EoA", "2.2.4", "training", "Arpit et al., NeurIPS 2022, arXiv:2110.10832",
           "The mean of all iterates of a run, and the ensemble of such means.", aliases=("S88",)),
    System("M64", "DiWA", "2.2.4", "analysis", "Ramé et al., NeurIPS 2022, arXiv:2205.09739",
           "Bias, variance, covariance and locality of averaged weights.", aliases=("S83",)),
    System("M65", "SGD stability (Hardt)", "2.2.4", "analysis", "Hardt et al., ICML 2016, arXiv:1509.01240",
           "How much one training example can move the result of SGD."),
    System("M66", "SWA generalisation (Wang)", "2.2.4", "analysis", "Wang et al., ICML 2024",
           "Stability bounds for averaged iterates under general sampling."),
    System("M67", "Mode-connecting curves", "2.2.4", "analysis",
           "Garipov et al., NeurIPS 2018, arXiv:1802.10026",
           "Trains a curve of low loss between two models."),
    System("M68", "AutoNEB", "2.2.4", "analysis", "Draxler et al., ICML 2018, arXiv:1803.00885",
           "Finds a path of low loss between two models by the nudged elastic band."),
    System("M69", "Loss-landscape / flatness", "2.2.4", "analysis",
           "Li et al., NeurIPS 2018, arXiv:1712.09913",
           "Pictures of the loss along filter-normalised directions, and measures of sharpness."),
    System("M70", "CTL", "2.2.4", "analysis", "Zhou et al., ICML 2024, arXiv:2402.03660",
           "Features of models fine-tuned for different tasks add up when their weights do.",
           aliases=("Cross-task linearity",)),
    System("M71", "Disentanglement error ξ", "2.2.4", "analysis",
           "Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827",
           "How much adding one task vector changes what another's task sees."),
    System("M72", "NTK spectral localisation", "2.2.4", "analysis",
           "Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827; Jacot et al., arXiv:1806.07572",
           "Whether eigenfunctions of the tangent kernel live on one task's inputs."),
)  # fmt: skip
