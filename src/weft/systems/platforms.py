"""Section 2.1: the baseline that merging is contrasted with, and the platforms before weft."""

from __future__ import annotations

from weft.systems import System

TESTS = "tests/systems/test_theory.py::"

SYSTEMS = (
    System("M01", "Output ensemble", "2.1", "inference", "Hansen & Salamon, Neural network ensembles, 1990",
           "Averages the outputs of several models; what one merged model is compared with.",
           entry="weft.analysis.ensemble:Ensemble",
           test=TESTS + "test_an_ensemble_is_an_upper_reference_that_averages_of_strangers_do_not_reach"),
    System("M02", "MergeKit (its recipes run unchanged)", "2.1", "platform",
           "Goddard et al., arXiv:2403.13257",
           "Merges language models by recipe. Its recipes run unchanged, and give its tensors where it is right.",
           entry="weft.recipes.build:build", test="tests/parity/test_goldens.py::test_equal"),
    System("M03", "FusionBench (its methods on any module, its suites)", "2.1", "platform",
           "Tang et al., arXiv:2406.03280", "Runs merging algorithms over pools of models and tasks.",
           entry="weft.bench.run:bench",
           test="tests/systems/test_bench_platform.py::test_methods_rank_on_any_module_and_suite"),
)  # fmt: skip
