"""Paths through layers: scales folded into the weights compute what scaled activations compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from weft.errors import UsageError
from weft.search.flow import flow, slots


def llama(seed: int, layers: int = 3) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-12,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().double()


USE = (1.0, -1.0, 0.2, 0.5, 0.5, -0.1)
SCALE = (0.5, 9.0, 1.7, 1.1, 0.8, 9.0)
PASSED = (0, 2, 3, 4)


@torch.no_grad()
def test_folded_scales_are_scaled_activations_in_a_real_llama() -> None:
    parents = [llama(0), llama(1)]
    made = flow(slots([weft.load(p) for p in parents]), USE, SCALE)
    model = llama(2, layers=4)
    weft.materialize(made, model)
    ids = torch.arange(12).reshape(2, 6)
    folded = model(ids).logits

    plain = llama(2, layers=4)
    weft.materialize(flow(slots([weft.load(p) for p in parents]), USE), plain)
    assert not torch.allclose(plain(ids).logits, folded, atol=1e-2)
    for t, layer in zip(PASSED, plain.model.layers, strict=True):
        layer.register_forward_pre_hook(lambda module, args, s=SCALE[t]: (args[0] * s, *args[1:]))
    torch.testing.assert_close(plain(ids).logits, folded, rtol=1e-6, atol=1e-6)


def test_a_path_repeats_and_mixes_layers() -> None:
    a, b = (
        {f"layers.{i}.o_proj.weight": torch.full((2, 2), float(10 * m + i)) for i in range(2)} for m in (1, 2)
    )
    listed = slots([weft.load(a), weft.load(b)], repeats=2)
    assert len(listed) == 8
    made = flow(listed, [1, 0, 0, 1, 1, 0, 1, 0])
    assert [float(made.tensor(f"layers.{i}.o_proj.weight")[0, 0]) for i in range(4)] == [
        10.0,
        21.0,
        10.0,
        20.0,
    ]
    scaled = flow(listed, [1, 0, 0, 1, 1, 0, 1, 0], [2.0, 1, 1, 0.5, 4.0, 1, 1.0, 1])
    values = [float(scaled.tensor(f"layers.{i}.o_proj.weight")[0, 0]) for i in range(4)]
    assert values == [5.0, 21.0, 2.5, 5.0]


def test_what_cannot_be_a_path() -> None:
    a = weft.load({f"layers.{i}.o_proj.weight": torch.ones(2, 2) for i in range(2)})
    listed = slots([a])
    for use, scale, said in (
        ([-1, -1], None, "no layer is passed"), ([1, 1, 1], None, "there are 2 slots"),
        ([1, 1], [1.0, 0.0], "must be positive"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            flow(listed, use, scale)
    unknown = slots([weft.load({"layers.0.mixer.weight": torch.ones(2)})])
    with pytest.raises(UsageError, match="name them"):
        flow(unknown, [1], [1.0])
    behind = {f"layers.0.{n}.weight": torch.ones(2) for n in ("o_proj", "post_feedforward_layernorm")}
    with pytest.raises(UsageError, match="search without scales"):
        flow(slots([weft.load(behind)]), [1], [1.0])
    with pytest.raises(UsageError, match="repeats"):
        slots([a], 0)
