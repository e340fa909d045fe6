"""Suites of language models that transformers runs: perplexity of texts, and tasks of lm-evaluation-harness.

suite = language_suite("path/base", {"math": "path/math", "code": "path/code"},
                       {"math": ("math-val.txt", "math-test.txt"), "code": ("code-val.txt", "code-test.txt")})
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.bench.suite import Data, Suite, Task
from weft.checkpoints.load import load
from weft.errors import MissingExtra, UsageError, did_you_mean

Texts = str | Path | Sequence[str]
"""A file (.txt, .jsonl, .gz) by its path, or the texts themselves in a list."""


def language_suite(
    base: Model,
    experts: Mapping[str, Model],
    texts: Mapping[str, tuple[Texts, Texts]],
    *,
    unseen: Mapping[str, Texts] | None = None,
    name: str = "language",
    length: int = 256,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Suite:
    """Perplexity of each expert's texts, (validation, test) by name; with tasks of lm-eval beside: `lm_eval_suite`.

    Models have a config of transformers; the base's tokenizer, or else bytes, cuts the texts. MissingExtra without
    transformers, UsageError where experts and texts have different names.
    """
    if set(experts) != set(texts):
        raise UsageError(f"experts are {', '.join(experts)}, texts of {', '.join(texts)}: name them alike")

    def task(of: str, parts: Mapping[str, Texts]) -> Task:
        return Task(of, {s: windows(base, t, length, batch) for s, t in parts.items()}, metric="perplexity")

    tasks = [task(n, {"validation": val, "test": test}) for n, (val, test) in texts.items()]
    apart = [task(n, {"test": t}) for n, t in (unseen or {}).items()]
    return Suite(name, maker(base, dtype), tasks, dict(experts), base, apart)


def windows(model: Model, texts: Texts, length: int = 256, batch: int = 4) -> Data:
    """Batches of ({input_ids, attention_mask}, targets [n, t]): the next token, −100 where there is none."""
    from weft.llm.hf import config_of, tokenizer_of
    from weft.statistics.texts import texts as cut

    source = load(model)
    given = Path(texts) if isinstance(texts, str) else texts
    size = int(getattr(config_of(source), "vocab_size", 256))
    made = cut(given, tokenizer_of(source), vocabulary=size, length=length, batch=batch)
    return [(one, _next(one["input_ids"], one["attention_mask"])) for one in made]


def _next(ids: Tensor, mask: Tensor) -> Tensor:
    targets = torch.full_like(ids, -100)
    there = mask[:, 1:] != 0
    targets[:, :-1] = torch.where(there, ids[:, 1:], -100)
    return targets


def maker(model: Model, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    """Makes the network of a checkpoint anew; it is read once."""
    made: list[nn.Module] = []

    def network() -> nn.Module:
        from weft.llm.hf import to_transformers

        if not made:
            made.append(to_transformers(load(model), dtype=dtype))
        return copy.deepcopy(made[0])

    return network


def lm_eval_suite(
    base: Model,
    experts: Mapping[str, Model],
    tasks: Mapping[str, str],
    *,
    metric: str = "acc,none",
    name: str = "lm-eval",
    limit: int | None = None,
    batch: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Suite:
    """Expert → a task of lm-evaluation-harness: its name, or a task file (.yaml). Nothing is tuned, for want of a
    validation split."""
    return Suite(
        name,
        maker(base, dtype),
        [lm_eval_task(n, base, tasks[n], metric, limit, batch) for n in experts],
        dict(experts),
        base,
    )


def lm_eval_task(
    name: str, model: Model, task: str, metric: str = "acc,none", limit: int | None = None, batch: int = 8
) -> Task:
    """A task that lm-evaluation-harness scores, on `limit` of its examples. MissingExtra when run without it."""

    def score(module: nn.Module, split: str) -> float:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
        except ImportError:
            raise MissingExtra("lm-eval", "eval", "a task of lm-evaluation-harness") from None
        from weft.llm.hf import tokenizer_of

        held: Any = HFLM(pretrained=module, tokenizer=tokenizer_of(load(model)), batch_size=batch)
        results = simple_evaluate(model=held, tasks=[task], limit=limit)["results"]
        # a task file is named by what is written in it
        found = results[task] if task in results else next(iter(results.values()))
        key = metric if metric in found else f"{metric},none"
        if key not in found:
            numbers = [k for k, v in found.items() if isinstance(v, int | float)]
            raise UsageError(
                f"task {task} has no metric {metric}{did_you_mean(metric, numbers)}; it has {', '.join(numbers)}"
            )
        return float(found[key])

    return Task(name, score=score)
