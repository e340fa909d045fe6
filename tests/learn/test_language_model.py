"""Models of transformers: keyword batches, tied embeddings, blocks with caches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import weft
from weft.learn import Mergeable, expert_merging, learn, prodistill

transformers = pytest.importorskip("transformers")

TASKS = ["math", "code"]


def tokens(seed: int, n: int = 16) -> Tensor:
    return torch.randint(64, (n, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llamas() -> list[Any]:
    """A base and two experts."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = [transformers.LlamaForCausalLM(config)]
        for _ in TASKS:
            made.append(copy.deepcopy(made[0]))
            with torch.no_grad():
                for p in made[-1].parameters():
                    p += 0.1 * torch.randn_like(p)
    return made


DATA = {"math": {"input_ids": tokens(1)}, "code": {"input_ids": tokens(2)}}


def divergence(merged: Mergeable) -> float:
    found = learn(merged, "distill", DATA, steps=1, lr=0.0, batch=16)
    return found.losses[0]


def test_coefficients_are_learned_on_a_language_model(llamas: list[Any], tmp_path: Path) -> None:
    base, *experts = llamas
    merged = Mergeable(base, base, experts, "layer")
    ids = tokens(3)
    found = learn(merged, "causal_lm", {"input_ids": ids, "labels": ids}, steps=10, lr=0.05, batch=16)
    assert found.losses[-1] < found.losses[0]
    assert "lm_head" not in found.coefficients and base.config.use_cache
    weft.save(found.checkpoint(), tmp_path / "out")
    filled = copy.deepcopy(base)
    weft.materialize(weft.load(tmp_path / "out"), filled)
    torch.testing.assert_close(filled(ids).logits, merged(input_ids=ids).detach(), rtol=1e-4, atol=1e-5)


def test_stages_forget_what_they_were_called_with(llamas: list[Any]) -> None:
    """A block that kept keys and values would attend to those of the step before."""
    base, *experts = llamas
    found = prodistill(base, base, experts, DATA, tasks=TASKS, parts="tensor", steps=4, lr=0.0, batch=16)
    by_stage = [found.losses[i : i + 4] for i in range(0, len(found.losses), 4)]
    assert len(by_stage) == 4  # embedding, two blocks, norm
    for losses in by_stage:
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    better = prodistill(base, base, experts, DATA, tasks=TASKS, steps=40, lr=0.02)
    assert divergence(better.merged) < 0.8 * divergence(Mergeable(base, base, experts, tasks=TASKS))


def test_hidden_states_of_blocks_are_aligned(llamas: list[Any]) -> None:
    base, *experts = llamas
    found = expert_merging(
        base, base, experts, DATA, tasks=TASKS, layers=["model.layers.0", "model.layers.1"], steps=15, lr=0.03,
        batch=16,
    )  # fmt: skip
    assert found.losses[-1] < 0.95 * found.losses[0]
