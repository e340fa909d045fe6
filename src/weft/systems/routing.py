"""Sections 2.2.3.4 and 2.2.3.5: merging anew for each input, and repairs after the merge."""

from __future__ import annotations

from weft.systems import System

SYSTEMS = (
    System("M56", "SMEAR", "2.2.3.4", "inference", "Muqeeth et al., TMLR 2024, arXiv:2306.03745",
           "A mixture of experts that averages the experts' weights by the router's output."),
    System("M57", "Twin-Merging", "2.2.3.4", "inference", "Lu et al., NeurIPS 2024, arXiv:2406.15479",
           "Keeps what experts share merged and what is their own compressed, and adds it by input."),
    System("M58", "WEMoE", "2.2.3.4", "inference", "Tang et al., ICML 2024, arXiv:2402.00433",
           "Merges the MLP blocks by input through small gates, everything else once."),
    System("M59", "PWEMoE", "2.2.3.4", "inference", "Tang et al., 2024, arXiv:2406.09770",
           "Gates that read a preference instead of an input, and so give a whole Pareto set.",
           aliases=("S62",)),
    System("M60", "Representation Surgery", "2.2.3.5", "training",
           "Yang et al., ICML 2024, arXiv:2402.02705",
           "A small module a task that pulls the merged model's features back to the expert's.",
           entry="weft.calibrate.surgery:surgery",
           test="tests/systems/test_calibration.py::test_surgery_brings_a_merge_near_its_experts"),
)  # fmt: skip
