"""Section 2.4.2: several tasks, objectives, domains, and auxiliary tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.systems import System

if TYPE_CHECKING:
    from weft.bench.results import Results
    from weft.bench.suite import Suite

RECIPES = ("linear", "task_arithmetic", "ties", "adamerging", "concrete", "surgery")
"""The survey's multi-task learners by merging, with the average that they are compared with."""


def multitask(suite: str | Suite, *, seeds: int = 1, samples: int = 64, tune: bool = False) -> Results:
    """Mergers as multi-task learners: one encoder of all experts, heads as the suite tells them.

    Accuracy by task and in the mean, over that of the task's own expert (`results.normalised(row)`), with what each
    recipe saw of the data and how many parameters it takes. AdaMerging and Concrete learn on test inputs.
    Settings are the published ones, as in the survey's tables; `tune` adds what validation labels would choose.
    """
    from weft.bench.run import bench

    return bench(suite, RECIPES, seeds=seeds, samples=samples, tune=tune)


ROUTED = "tests/systems/test_routing_systems.py::"

SYSTEMS = (
    System("S59", "MTL by TA / TIES / AdaMerging / Concrete / Surgery", "2.4.2.1", "study",
           "Tang et al., FusionBench, arXiv:2406.03280",
           "The protocol by which mergers of section 2.2 are compared as multi-task learners.",
           entry="weft.systems.multitask:multitask",
           test="tests/systems/test_multitask.py::test_merging_makes_multi_task_learners_in_the_known_order"),
    System("S60", "ZipIt! for MTL", "2.4.2.1", "alignment", "Stoica et al., ICLR 2024, arXiv:2305.03053",
           "Zips correlated features of models of different tasks and starts, up to a layer.",
           entry="weft.align.zipping:zip_models",
           test="tests/systems/test_matching.py::test_zips_of_networks_with_disjoint_labels_beat_plain_and_permuted_means"),
    System("S61", "L-LoRA partial linearisation", "2.4.2.1", "training",
           "Tang et al., ICLR 2024, arXiv:2310.04742", "Linearised adapters, merged for several tasks.",
           entry="weft.systems.linearised:l_lora",
           test="tests/systems/test_finetune.py::test_linearised_adapters_add_up_where_factors_do_not"),
    System("S62", "PWE-MoE Pareto set", "2.4.2.2", "inference", "Tang et al., 2024, arXiv:2406.09770",
           "One model whose gates turn a preference into weights.", entry="weft.systems.routing:pwemoe",
           test=ROUTED + "test_a_pareto_set_from_one_model_covers_more_than_a_sweep_of_merges"),
    System("S63", "MAP amortised Pareto fronts", "2.4.2.2", "search", "Li et al., 2024, arXiv:2406.07529",
           "Fits quadratic models of the metrics over the coefficients and evolves the front on them."),
    System("S64", "ViT merging with gating and weight similarity (Ye)", "2.4.2.3", "inference",
           "Ye et al., 2023, arXiv:2312.16240", "Merges similar layers once and dissimilar ones by input.",
           entry="weft.systems.routing:gated_where_dissimilar",
           test=ROUTED + "test_gates_where_experts_differ_serve_nearly_like_gates_everywhere"),
    System("S65", "Branch-Train-Merge", "2.4.2.3", "training", "Li et al., 2022, arXiv:2208.03306",
           "Grows a forest of domain experts and mixes or averages them by the domain's posterior."),
    System("S66", "ForkMerge", "2.4.2.4", "training", "Jiang et al., NeurIPS 2023, arXiv:2301.12618",
           "Forks training over weights of auxiliary tasks and merges by validation, again and again."),
)  # fmt: skip
