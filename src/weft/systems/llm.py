"""Section 2.3.1: aligning, detoxifying, unlearning, training faster and combining language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import weft
from weft.systems import System
from weft.systems.basic import task_negation, weight_average
from weft.systems.subspace import DARE
from weft.systems.weighted import CHECKPOINTS, EVOLVED, GRID, METAGPT, Choice

if TYPE_CHECKING:
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint


def expo(aligned: Model, sft: Model, alpha: float = 0.3) -> Checkpoint:
    """θ_SFT + (1+α)(θ_aligned − θ_SFT): go on in the direction alignment has taken."""
    return weft.merge([aligned], "expo", base=sft, alpha=alpha)


def forget(
    base: Model,
    bad: Model,
    target: Callable[[Checkpoint], float],
    control: Callable[[Checkpoint], float],
    keep: float = 0.95,
    grid: Sequence[float] = GRID,
) -> Choice:
    """θ0 − λ(θ_bad − θ0) with the λ of least `target` among those that keep 95 % of `control`.

    Both are measured on validation data, and higher means more of it: of the skill to forget, and of what
    must stay. λ = 0 always qualifies.
    """
    wanted = keep * control(weft.load(base))
    tried = {0.0: target(weft.load(base))}
    for scale in grid:
        made = task_negation(base, bad, scale)
        if scale and control(made) >= wanted:
            tried[scale] = target(made)
    best = min(tried, key=lambda scale: (tried[scale], scale))
    return Choice(best, tried[best], task_negation(base, bad, best), tried)


def fuse_to_forget(models: Sequence[Model]) -> Checkpoint:
    """The plain mean of models of one task: what all of them know stays, what only one knows fades."""
    return weight_average(models)


TESTS = "tests/systems/test_llm.py::"
HERE = "weft.systems.llm:"
RUNS = "tests/systems/test_trajectory.py::"

SYSTEMS = (
    System("S01", "ExPO (model extrapolation)", "2.3.1.1", "merge",
           "Zheng et al., 2024, arXiv:2404.16792",
           "Extrapolates from the SFT model through the aligned one.", entry=HERE + "expo",
           test=TESTS + "test_expo_gains_reward_beyond_a_short_dpo_training"),
    System("S02", "DogeRM", "2.3.1.1", "merge", "Lin et al., EMNLP 2024, arXiv:2407.01470",
           "Merges a domain model into the trunk of a reward model."),
    System("S03", "Online merging optimisers (OnDARE, OnTIES)", "2.3.1.1", "training",
           "Lu et al., 2024, arXiv:2405.17931",
           "Blends each optimiser update with the SFT task vector while aligning."),
    System("S04", "RESTA safety vector", "2.3.1.1", "merge", "Bhardwaj et al., ACL 2024, arXiv:2402.11746",
           "Adds the difference of an aligned model and its harmful fine-tune, to make safe again."),
    System("S05", "Safety-aware data-driven merging (Hammoud)", "2.3.1.1", "search",
           "Hammoud et al., EMNLP Findings 2024, arXiv:2406.14563",
           "Searches merging weights with safety as one of the tasks."),
    System("S06", "SOMF safety realignment", "2.3.1.1", "search", "Yi et al., 2024, arXiv:2405.09055",
           "Learns which part of the task vectors may stay so that the fused model is safe."),
    System("S07", "Rewarded Soups", "2.3.1.1", "training", "Ramé et al., NeurIPS 2023, arXiv:2306.04488",
           "Trains a policy a reward and interpolates them by the user's preference."),
    System("S08", "Personalized Soups (P-Soups, RLPHF)", "2.3.1.1", "training",
           "Jang et al., 2023, arXiv:2310.11564", "Averages the adapters of the preferences a user states."),
    System("S09", "SFT / DPO / RLHF substrate", "2.3.1.1", "training",
           "Rafailov et al., NeurIPS 2023, arXiv:2305.18290 (DPO)",
           "The losses by which language models are tuned and aligned."),
    System("S10", "Task-vector negation (detox and forgetting)", "2.3.1.2", "merge",
           "Ilharco et al., ICLR 2023, arXiv:2212.04089",
           "Subtracts what a model trained on the unwanted has learned, as far as a control allows.",
           entry=HERE + "forget",
           test=TESTS + "test_forgetting_under_a_control_lowers_the_target_and_keeps_the_rest"),
    System("S11", "PEM arithmetic (LoRA, (IA)3)", "2.3.1.2", "merge",
           "Zhang et al., NeurIPS 2023, arXiv:2306.14870", "Adds, negates and interpolates adapters.",
           entry="weft.adapters.arithmetic:Combined",
           test="tests/systems/test_adapters.py::test_adapters_add_and_negate_as_lora_and_as_ia3"),
    System("S12", "Ethos", "2.3.1.2", "merge", "Gao et al., NAACL Findings 2024, arXiv:2403.08994",
           "Negates only what stands out of a task vector in the aligned weights' singular basis."),
    System("S13", "Ext-Sub", "2.3.1.2", "merge", "Hu et al., AAAI 2024, arXiv:2308.08090",
           "Subtracts from an expert what an anti-expert does not share with it, row by row."),
    System("S14", "Detox baselines: clean fine-tune, GeDi decode", "2.3.1.2", "study",
           "Keskar et al., 2019; Krause et al., 2020, arXiv:2009.06367",
           "What negation is compared with: more training on clean text, and guided decoding."),
    System("S15", "Gradient-ascent unlearning baseline", "2.3.1.3", "training",
           "Thudi et al., 2022; Yao et al., 2023", "Maximises the loss on what is to be forgotten."),
    System("S16", "SSU stable sequential unlearning", "2.3.1.3", "training",
           "Dou et al., NAACL Findings 2025, arXiv:2406.10952",
           "Forgets one set after the other by negated, saliency-masked task vectors."),
    System("S17", "Fuse to Forget", "2.3.1.3", "merge", "Zaman et al., EMNLP 2024, arXiv:2311.07682",
           "Averages models that share a task: what only one of them has memorised is forgotten.",
           entry=HERE + "fuse_to_forget",
           test=TESTS + "test_fusing_forgets_a_shortcut_of_one_parent_and_keeps_a_shared_one"),
    System("S18", "F-Learning (FLearning)", "2.3.1.3", "training", "Ni et al., ACL 2024, arXiv:2311.08011",
           "Subtracts what old facts have taught before new ones are learned."),
    System("S19", "SKU", "2.3.1.3", "training", "Liu et al., ACL Findings 2024, arXiv:2402.10058",
           "Trains a model on harm without normal skill, and subtracts it."),
    System("S20", "LAWA", "2.3.1.4", "training", "Kaddour, 2022, arXiv:2209.14981",
           "Averages the latest checkpoints of a run while it is training.",
           entry="weft.train.trace:Trace", test=RUNS + "test_the_latest_average_gets_there_earlier"),
    System("S21", "Early weight averaging with high LR (Sanyal)", "2.3.1.4", "training",
           "Sanyal et al., COLM 2024, arXiv:2306.03241",
           "LAWA for pre-training: checkpoints far apart, at a high learning rate.",
           entry="weft.train.trace:Trace", test=RUNS + "test_averaging_gains_more_at_a_high_rate"),
    System("S22", "Checkpoint Merging (Bayesian optimisation)", "2.3.1.4", "search",
           "Liu et al., 2024, arXiv:2403.19390",
           "Weighs neighbouring pre-training checkpoints by Bayesian optimisation.",
           entry=CHECKPOINTS[0], test=CHECKPOINTS[1]),
    System("S23", "Fusing fine-tuned models as a base", "2.3.1.4", "training",
           "Choshen et al., 2022, arXiv:2204.03044",
           "Starts new fine-tunings from the mean of models that others have fine-tuned."),
    System("S24", "ColD Fusion", "2.3.1.4", "training", "Don-Yehiya et al., ACL 2023, arXiv:2212.01378",
           "Fusing in rounds: contributors fine-tune the shared body, which becomes their mean."),
    System("S25", "Language-model arithmetic (Dekoninck)", "2.3.1.5", "inference",
           "Dekoninck et al., ICLR 2024, arXiv:2311.14479",
           "Adds and subtracts next-token distributions; no weights are merged."),
    System("S26", "Robust Weight Signatures", "2.3.1.5", "merge", "Cai et al., ICML 2023",
           "Patches a network against a corruption with what robust training adds to clean training."),
    System("S27", "Evolutionary model merge", "2.3.1.5", "search", "Akiba et al., 2024, arXiv:2403.13187",
           "Evolves merging parameters and the order of layers.", entry=EVOLVED[0], test=EVOLVED[1]),
    System("S28", "FuseLLM", "2.3.1.5", "training", "Wan et al., ICLR 2024, arXiv:2401.10491",
           "Distils the fused distributions of several language models into one.",
           entry="weft.transform.fuse:fusellm",
           test="tests/systems/test_transform.py::"
           "test_a_language_model_learns_more_from_another_than_from_the_text_alone"),
    System("S29", "FuseChat", "2.3.1.5", "training", "Wan et al., 2024, arXiv:2402.16107",
           "FuseLLM pair by pair, then a merge by the size of the updates.",
           entry="weft.transform.fuse:fusechat",
           test="tests/systems/test_transform.py::test_chats_taught_by_several_merge_by_how_far_they_moved"),
    System("S30", "DARE", "2.3.1.5", "merge", "Yu et al., ICML 2024, arXiv:2311.03099",
           "Drops most of a fine-tune at random, rescales the rest, and merges.",
           entry=DARE[0], test=DARE[1]),
    System("S31", "WIDEN", "2.3.1.5", "merge", "Yu et al., 2024, arXiv:2408.03092",
           "Weighs columns by how much their magnitude and direction have changed."),
    System("S32", "MetaGPT", "2.3.1.5", "merge", "Zhou et al., EMNLP 2024, arXiv:2406.11385",
           "Weighs each task vector by its share of the squared norms.", entry=METAGPT[0], test=METAGPT[1]),
)  # fmt: skip
