"""Section 2.4.5: new languages and tasks from no or few examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import weft
from weft.systems import System

if TYPE_CHECKING:
    from torch import Tensor, nn

    from weft.adapters.merge import Source
    from weft.adapters.output import AdapterCheckpoint
    from weft.adapters.soups import Soup
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint


def chat_vector(continued: Model, chat: Model, base: Model, scale: float = 1.0) -> Checkpoint:
    """θ_CP + r (θ_chat − θ_base): the language of one descendant with the manners of another.

    Tensors whose shape differs, as embeddings and head do after the vocabulary was extended, stay those of
    the continued model. Lower the scale if it answers in the wrong language.
    """
    return weft.merge(
        [continued, chat, base], "linear", weight=[1.0, scale, -scale], normalize=False, mismatch="carry"
    )


def language_and_task(
    task: Source, target: Source, source: Source | None = None, scale: float = 1.0
) -> AdapterCheckpoint:
    """An adapter for a task in a language without data of it.

    φ_task + λ(φ_target − φ_source) of adapters for the task and, by language modelling, for the two languages;
    without `source` the sum λφ_task + (1−λ)φ_target. Exact, at the sum of the ranks.
    """
    from weft.adapters.merge import merge_adapters

    if source is None:
        return merge_adapters([task, target], [scale, 1 - scale], how="concat")
    return merge_adapters([task, target, source], [1.0, scale, -scale], how="concat")


def learned_composition(
    module: nn.Module, adapters: Sequence[Source], loss: Callable[[Any, Any], Tensor], examples: Any,
    steps: int = 60,
) -> Soup:  # fmt: skip
    """Adapters of upstream tasks with weights for each tensor, a softmax learned on a few examples.

    The even combination is `weft.merge_adapters(adapters)`, which needs no examples.
    """
    from weft.adapters.soups import learn_soup

    return learn_soup(module, adapters, loss, [examples], per="tensor", simplex=True, steps=steps)


TESTS = "tests/systems/test_adapters.py::"

SYSTEMS = (
    System("S98", "Chat Vector", "2.4.5.1", "merge", "Huang et al., ACL 2024, arXiv:2310.04799",
           "Adds the difference of a chat model and its base to a model pre-trained on in another language.",
           entry="weft.systems.fewshot:chat_vector",
           test="tests/systems/test_fewshot.py::test_a_chat_vector_carries_the_format_into_another_language"),
    System("S99", "Language and task arithmetic (Chronopoulou)", "2.4.5.1", "merge",
           "Chronopoulou et al., 2023, arXiv:2311.09344",
           "Adds adapters for a task and a language, for tasks without data in that language.",
           entry="weft.systems.fewshot:language_and_task",
           test=TESTS + "test_adapters_of_a_task_and_of_a_language_make_one_for_both"),
    System("S100", "Language arithmetic for adapters (Klimaszewski)", "2.4.5.1", "merge",
           "Klimaszewski et al., COLING 2025, arXiv:2404.15737",
           "Weighs language adapters to improve one, or to stand in for one that is missing."),
    System("S101", "AdaMergeX", "2.4.5.1", "merge", "Zhao et al., 2024, arXiv:2402.18913",
           "Moves a task's adapter to another language by what a reference task's adapters differ.",
           entry="weft.adapters.arithmetic:transferred",
           test=TESTS + "test_what_a_reference_task_differs_by_moves_a_task_as_lora_and_as_ia3"),
    System("S102", "LoraHub", "2.4.5.2", "search", "Huang et al., COLM 2024, arXiv:2307.13269",
           "Searches weights for a library of LoRAs on a few examples, without gradients.",
           entry="weft.adapters.hub:lorahub",
           test=TESTS + "test_lorahub_finds_the_adapters_that_an_unseen_mixture_needs"),
    System("S103", "LoraRetriever", "2.4.5.2", "inference",
           "Zhao et al., ACL Findings 2024, arXiv:2402.09997",
           "Retrieves the LoRAs nearest to an input and composes them."),
    System("S104", "MerA", "2.4.5.2", "training", "He et al., 2023, arXiv:2308.15982",
           "Aligns adapters by optimal transport, merges them and tunes on a few examples."),
    System("S105", "Few-shot PEFT composition study (Asadi)", "2.4.5.2", "study",
           "Asadi et al., 2024, arXiv:2402.15414",
           "When combining adapters, evenly or by learned weights, helps with few examples.",
           entry="weft.systems.fewshot:learned_composition",
           test=TESTS + "test_a_learned_composition_beats_a_lora_from_scratch_with_few_examples"),
)  # fmt: skip
