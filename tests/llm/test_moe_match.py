"""Matching experts: a permuted copy is put back exactly, and no permutation changes what is computed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import checkpoint, logits, mixture, on_disk

import weft
from weft.checkpoints.assembled import Assembled, Span
from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError
from weft.llm.moe.blocks import blocks_of, rearranged
from weft.llm.moe.match import match_experts, matching

KINDS = ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"]
ORDERS = {0: (2, 0, 3, 1), 1: (1, 3, 2, 0)}
GROUPED = {1: (3, 2, 0, 1)}
"""Groups of two swapped, one of them turned round: what a router by groups does not see."""


def permuted(model: Checkpoint, orders: dict[int, tuple[int, ...]]) -> Checkpoint:
    pieces: dict[str, Any] = {name: Span(model, name) for name in model}
    for block in blocks_of(model):
        assert block.layer is not None
        pieces |= rearranged(block, orders[block.layer])
    return Assembled(pieces, config=model.config, aliases=model.aliases, origin="permuted")


def orders_for(kind: str) -> dict[int, tuple[int, ...]]:
    return GROUPED if kind.startswith("Deepseek") else ORDERS


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_permuted_copy_computes_the_same_and_is_matched_back(
    kind: str, fused: bool, tmp_path: Path
) -> None:
    module = mixture(kind)
    model = checkpoint(module) if fused else on_disk(module, tmp_path)
    assert blocks_of(model)[0].experts.fused == fused
    mixed = permuted(model, orders_for(kind))
    assert any(not torch.equal(mixed.tensor(n), model.tensor(n)) for n in model)
    assert torch.allclose(logits(mixed), logits(model), atol=1e-6)
    for by in ("weights", "router", "both"):
        back = match_experts(mixed, model, by)
        assert list(back) == list(model) and back.config == model.config
        for name in model:
            assert torch.equal(back.tensor(name), model.tensor(name)), (by, name)


def test_either_layout_is_matched_to_the_other(tmp_path: Path) -> None:
    module = mixture()
    split, fused = on_disk(module, tmp_path), checkpoint(module)
    back = match_experts(permuted(fused, ORDERS), split)
    assert all(torch.equal(back.tensor(n), fused.tensor(n)) for n in fused)
    back = match_experts(permuted(split, ORDERS), fused)
    assert all(torch.equal(back.tensor(n), split.tensor(n)) for n in split)


def test_matching_undoes_a_permutation_under_noise_and_mends_the_merge() -> None:
    a = checkpoint(mixture("Qwen3MoeForCausalLM"))
    generator = torch.Generator().manual_seed(5)
    near = {n: v + 0.001 * torch.randn(v.shape, generator=generator) for n, v in a.state_dict().items()}
    from weft.checkpoints.memory import StateDict
    from weft.checkpoints.model import Model

    b = permuted(Model(StateDict(near), a.config, (), "b"), ORDERS)
    matched = match_experts(b, to=a)
    want = {block.prefix: tuple(ORDERS[block.layer].index(e) for e in range(4)) for block in blocks_of(a)}
    assert matched.orders() == want
    truth, right, wrong = (logits(m) for m in (a, weft.merge([a, matched]), weft.merge([a, b])))
    assert (right - truth).norm() < 0.1 * (wrong - truth).norm()


def test_the_assignment_is_the_cheapest_of_all() -> None:
    from itertools import permutations

    a, b = (blocks_of(checkpoint(mixture("MixtralForCausalLM", seed)))[0] for seed in (0, 1))

    def cost(order: tuple[int, ...]) -> float:
        return sum(
            float((a.model.tensor(n)[i] - b.model.tensor(n)[e]).double().square().sum())
            for part in a.experts.parts for n in a.names(part) for i, e in enumerate(order)
        )  # fmt: skip

    assert cost(matching(b, a)) == pytest.approx(min(cost(o) for o in permutations(range(4))))


def test_it_is_lazy_streams_and_pickles(tmp_path: Path) -> None:
    model = on_disk(mixture(), tmp_path / "m")
    mixed = permuted(model, ORDERS)
    made = match_experts(mixed, model)
    assert not made._found  # nothing is read until a tensor is
    copy = pickle.loads(pickle.dumps(made))
    name = next(n for n in model if "experts.3" in n)
    assert torch.equal(copy.read(name, 32, 96), model.read(name, 32, 96))
    assert made.identity() == match_experts(mixed, model).identity()
    assert made.identity() != match_experts(mixed, model, "router").identity()
    saved = weft.load(weft.save(made, tmp_path / "out", threads=2, memory="128MiB").path)
    assert all(torch.equal(saved.tensor(n), model.tensor(n)) for n in model)


def test_what_cannot_be_matched() -> None:
    a, few = checkpoint(mixture(), "a"), checkpoint(mixture("MixtralForCausalLM", 0, 3), "few")
    with pytest.raises(DataProblems, match=r"4 experts in a, 3 in few; bring a to 3 with reduce_experts"):
        match_experts(a, few)
    with pytest.raises(DataProblems, match="the experts have other shapes"):
        match_experts(a, checkpoint(mixture("Qwen3MoeForCausalLM")))
    with pytest.raises(DataProblems, match="2 layers with experts in a, 1 in"):
        match_experts(a, checkpoint(mixture("DeepseekV3ForCausalLM")))
    with pytest.raises(UsageError, match="did you mean 'router'"):
        match_experts(a, a, "routers")  # type: ignore[arg-type]
    from moe_models import dense

    with pytest.raises(UsageError, match="has no experts: it is no mixture"):
        match_experts(checkpoint(dense("LlamaForCausalLM")), a)
