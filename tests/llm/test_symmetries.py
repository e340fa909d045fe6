"""Symmetries of every architecture of the zoo: found, as written by hand, and kept by models on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, answer, born, housed, woken

import weft
from weft.align import Group, PermutationSpec, discover, preserved, spec_of, weight_matching
from weft.align.spec import Axis
from weft.align.terms import groups_in

Axes = dict[str, tuple[str | int | None, ...]]


def pick(name: str) -> Any:
    return (lambda found: found.logits_per_text) if name == "clip" else None


def inputs(name: str) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in ZOO[name].inputs().items()}


@pytest.mark.parametrize("name", ZOO)
def test_no_architecture_can_tell_a_random_permutation(name: str) -> None:
    model = born(name, 0).double()
    spec = discover(model, inputs(name), outputs=pick(name))
    with torch.device("meta"):
        ghost = type(model)(model.config)  # type: ignore[call-arg]
    assert (
        discover(ghost.double(), inputs(name), outputs=pick(name)) == spec
    )  # and no weight is needed to find it
    # at least the residual stream and the hidden units of each block
    assert sum(not g.within and not g.fixed for g in spec.groups.values()) > ZOO[name].layers
    # rotary angles are computed in float32 whatever the model is in
    assert max(preserved(model, spec, inputs(name), seed=s, outputs=pick(name)) for s in range(2)) < 1e-5


def agree(found: PermutationSpec, hand: PermutationSpec) -> None:
    """They have as many units, and a random permutation, written as one of either, moves tensors alike."""
    assert found.degrees == hand.degrees
    called: dict[str, str] = {}
    for name, row in hand.axes.items():
        for x, y in zip(row, found.axes[name], strict=True):
            for h, f in zip(moving(hand, x), moving(found, y), strict=True):
                assert called.setdefault(h, f) == f
    permutations = hand.random(0)
    theirs = {called[n]: p for n, p in permutations.items()}
    state = {n: torch.arange(t.numel()).reshape(t.shape) for n, t in shapes(hand, found).items()}
    for name, tensor in state.items():
        one = dict.fromkeys((name,), tensor)
        a = weft.align.reordered(one, hand, permutations)[name]
        assert torch.equal(a, weft.align.reordered(one, found, theirs)[name]), name


def moving(spec: PermutationSpec, term: Axis) -> list[str]:
    return [g for g in groups_in(term) if g in spec.movable]


def shapes(hand: PermutationSpec, found: PermutationSpec) -> dict[str, Tensor]:
    from weft.align.terms import size_of

    sizes = [{n: g.size for n, g in s.groups.items()} for s in (hand, found)]
    made = {}
    for name, row in hand.axes.items():
        told = [tuple(size_of(t, z) for t in r) for r, z in zip((row, found.axes[name]), sizes, strict=True)]
        assert told[0] == told[1], name
        made[name] = torch.empty([s or 1 for s in told[0]])
    return made


def test_llama_by_hand() -> None:
    """Rotary pairs keep the dimensions of queries and keys where they are; heads move with those they share."""
    axes: Axes = {
        "model.embed_tokens.weight": (96, "e"),
        "model.norm.weight": ("e",),
        "lm_head.weight": (96, "e"),
    }
    groups: dict[str, int | Group] = {"e": 32}
    for i in range(3):
        at = f"model.layers.{i}"
        groups |= {f"kv{i}": 2, f"q{i}": Group(2, (f"kv{i}",)), f"v{i}": Group(8, (f"kv{i}",)), f"f{i}": 48}
        axes |= {
            f"{at}.self_attn.q_proj.weight": (f"kv{i}*q{i}*8", "e"),
            f"{at}.self_attn.k_proj.weight": (f"kv{i}*8", "e"),
            f"{at}.self_attn.v_proj.weight": (f"kv{i}*v{i}", "e"),
            f"{at}.self_attn.o_proj.weight": ("e", f"kv{i}*q{i}*v{i}"),
            f"{at}.mlp.gate_proj.weight": (f"f{i}", "e"), f"{at}.mlp.up_proj.weight": (f"f{i}", "e"),
            f"{at}.mlp.down_proj.weight": ("e", f"f{i}"),
            f"{at}.input_layernorm.weight": ("e",), f"{at}.post_attention_layernorm.weight": ("e",),
        }  # fmt: skip
    agree(discover(born("llama", 0)), PermutationSpec.of(groups, axes))


def test_gpt2_by_hand() -> None:
    """Conv1D keeps weights as [in, out]; q, k and v are one tensor; q and k share dimensions, v has its own."""
    axes: Axes = {
        f"{n}.weight": (s, "e")
        for n, s in (("transformer.wte", 96), ("transformer.wpe", 64), ("lm_head", 96))
    }
    groups: dict[str, int | Group] = {"e": 32}
    norm = {"transformer.ln_f": 0}
    for i in range(3):
        at, qkv = f"transformer.h.{i}", f"h{i}*k{i}|h{i}*k{i}|h{i}*v{i}"
        groups |= {f"h{i}": 4, f"k{i}": Group(8, (f"h{i}",)), f"v{i}": Group(8, (f"h{i}",)), f"f{i}": 128}
        axes |= {
            f"{at}.attn.c_attn.weight": ("e", qkv), f"{at}.attn.c_attn.bias": (qkv,),
            f"{at}.attn.c_proj.weight": (f"h{i}*v{i}", "e"), f"{at}.attn.c_proj.bias": ("e",),
            f"{at}.mlp.c_fc.weight": ("e", f"f{i}"), f"{at}.mlp.c_fc.bias": (f"f{i}",),
            f"{at}.mlp.c_proj.weight": (f"f{i}", "e"), f"{at}.mlp.c_proj.bias": ("e",),
        }  # fmt: skip
        norm |= {f"{at}.ln_1": 0, f"{at}.ln_2": 0}
    axes |= {f"{n}.{p}": ("e",) for n in norm for p in ("weight", "bias")}
    agree(discover(born("gpt2", 0)), PermutationSpec.of(groups, axes))


def test_vit_by_hand() -> None:
    groups: dict[str, int | Group] = {"e": 32}
    axes: Axes = {}
    for name, tensor in born("vit", 0).state_dict().items():
        row = tuple("e" if s == 32 else s for s in tensor.shape)
        block = re.match(r"vit\.layers\.(\d+)\.(attention|mlp)\.(\w+)", name)
        if block is not None:
            i, part = block[1], block[3]
            groups |= {f"h{i}": 4, f"k{i}": Group(8, (f"h{i}",)), f"v{i}": Group(8, (f"h{i}",)), f"f{i}": 48}
            rows = {"q_proj": (f"h{i}*k{i}", "e"), "k_proj": (f"h{i}*k{i}", "e"), "v_proj": (f"h{i}*v{i}", "e"),
                    "o_proj": ("e", f"h{i}*v{i}"), "fc1": (f"f{i}", "e"), "fc2": ("e", f"f{i}")}  # fmt: skip
            row = rows[part][: tensor.dim()]
        axes[name] = row
    agree(discover(born("vit", 0), ZOO["vit"].inputs()), PermutationSpec.of(groups, axes))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit", "mixtral", "deepseek_v3"])
def test_a_saved_model_is_aligned_by_its_config_alone(name: str, tmp_path: Path) -> None:
    """Folders in, a lazy checkpoint out, which transformers loads and which answers as before."""
    model = born(name, 1)
    folder = housed(model, tmp_path / "b")
    spec = spec_of(folder)

    def at_random(spec: PermutationSpec, a: weft.Checkpoint, b: weft.Checkpoint) -> dict[str, Tensor]:
        return spec.random(1)

    weft.save(weft.align(folder, to=folder, how=at_random, spec=spec), tmp_path / "moved")
    there = weft.load(tmp_path / "moved")
    assert any(not torch.equal(there.tensor(n), weft.load(folder).tensor(n)) for n in there)
    again = woken(name, tmp_path / "moved")
    torch.testing.assert_close(answer(name, again), answer(name, model), rtol=1e-4, atol=1e-4)
    aligned = weft.align(tmp_path / "moved", to=folder)
    for n in aligned:
        assert torch.equal(aligned.tensor(n), weft.load(folder).tensor(n)), n


def test_heads_are_matched_with_what_is_within_them() -> None:
    """Two unrelated models: a matching of heads and their dimensions is better than what either alone can do."""
    a, b = born("gpt2", 0, 1), born("gpt2", 1, 1)
    spec = discover(a)
    found = weight_matching(spec, a, b)
    flat = PermutationSpec(
        {n: Group(g.size, g.within, "attn" in n, g.nodes) for n, g in spec.groups.items()}, spec.axes
    )
    assert weft.align.agreement(spec, a, b, found) > weft.align.agreement(
        flat, a, b, weight_matching(flat, a, b)
    )
    assert isinstance(a, nn.Module)
