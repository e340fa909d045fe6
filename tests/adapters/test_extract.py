"""Extraction: the best approximation, the same function in PEFT, the errors it reports, and what it refuses."""

import json

import adapter_models as small
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import weft
from weft.adapters.difference import Difference
from weft.adapters.extract import extract_lora
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError


def pair(shape, rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    flat = torch.randn(shape[0], base[0].numel(), generator=g, dtype=torch.float64)
    if rank is not None:
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        flat = u[:, :rank] * s[:rank] @ v[:rank]
    delta = flat.reshape(shape)
    return StateDict({"m.weight": base + delta}, "model"), StateDict({"m.weight": base}, "base"), delta


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 9), st.integers(0, 3))
def test_it_is_the_best_approximation_and_its_error_is_true(shape, rank, seed):
    model, base, delta = pair(shape, seed=seed)
    made = Difference(model, base, "m.weight").best(min(rank, *shape))
    got = made.left @ made.right
    s = torch.linalg.svdvals(delta)
    best = float(s[rank:].norm() / s.norm())
    assert float((delta - got).norm() / delta.norm()) == pytest.approx(best, abs=1e-7)
    assert made.error == pytest.approx(best, abs=1e-7)
    assert torch.allclose(made.left.norm(dim=0), made.right.norm(dim=1))
    assert torch.allclose(Difference(model, base, "m.weight").spectrum(), s, atol=1e-7)


@pytest.mark.parametrize("shape", [(300, 120), (120, 300)])
def test_fast_is_nearly_as_good_and_says_how_good(shape):
    g = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(shape[0], 120, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(shape[1], 120, generator=g, dtype=torch.float64))[0]
    s = 0.95 ** torch.arange(120, dtype=torch.float64)
    delta = u * s @ v.T
    model, base = StateDict({"w": delta}), StateDict({"w": torch.zeros_like(delta)})
    made, _ = Difference(model, base, "w").sketched(8, seed=3)
    true = float((delta - made.left @ made.right).norm() / delta.norm())
    best = float(s[8:].norm() / s.norm())
    assert made.error == pytest.approx(true, rel=1e-6)
    assert best * (1 - 1e-9) <= true < 1.01 * best
    again, _ = Difference(model, base, "w").sketched(8, seed=3)
    assert torch.equal(again.left, made.left)
    other, _ = Difference(model, base, "w").sketched(8, seed=4)
    assert not torch.equal(other.left, made.left)


def test_blocks_of_rows_change_nothing(monkeypatch):
    model, base, _ = pair((50, 6))
    whole = Difference(model, base, "m.weight").best(3)
    monkeypatch.setattr("weft.adapters.difference._BLOCK", 40)
    monkeypatch.setattr("weft.adapters.difference._HELD", 10)
    assert len(list(Difference(model, base, "m.weight").blocks())) == 9
    cut = Difference(model, base, "m.weight").best(3)
    assert torch.allclose(whole.left @ whole.right, cut.left @ cut.right, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (small.llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
        (small.llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}}),
        (small.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["llama", "patterns", "gpt2"],
)
def test_round_trip_is_the_same_function(tmp_path, build, config):
    model = build()
    peft = small.lora(model, **config)
    small.written(model, tmp_path / "base")
    small.written(peft, tmp_path / "adapter")
    whole = weft.load(tmp_path / "adapter", base=tmp_path / "base")
    assert small.distance(small.state_of(whole), small.merged(peft)) < 1e-6
    back = extract_lora(whole, tmp_path / "base", rank=4)
    small.save(back, tmp_path / "out")
    assert max(e["error"] for e in back.report.values()) < 1e-5
    ids = torch.arange(12)[None] % 40
    again = small.loaded_by_peft(model, tmp_path / "out")
    with torch.no_grad():
        want, got = peft(ids).logits, again(ids).logits
    assert float((want - model(ids).logits).abs().max()) > 1e-2
    assert torch.allclose(want, got, atol=1e-5)
    # what was written is read back as the same update
    state = small.state_of(weft.load(tmp_path / "out", base=tmp_path / "base"))
    assert small.distance(state, small.merged(peft)) < 1e-5


def test_energy_gives_each_weight_the_least_rank_that_keeps_it(tmp_path):
    base = small.llama()
    model = small.llama(1)
    made = extract_lora(small.llama(1), base, energy=0.9, include=r"(q|down)_proj")
    report = small.save(made, tmp_path / "out") and made.report
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ours, theirs = model.state_dict(), base.state_dict()
    ranks = set()
    for name, entry in report.items():
        s = torch.linalg.svdvals((ours[name] - theirs[name]).double()).square()
        kept = s.cumsum(0) / s.sum()
        assert entry["rank"] == int((kept < 0.9).sum()) + 1
        assert entry["error"] == pytest.approx(float((1 - kept[entry["rank"] - 1]).sqrt()), rel=1e-6)
        ranks.add(entry["rank"])
    assert len(ranks) > 1 and set(config["rank_pattern"].values()) | {config["r"]} == ranks
    assert config["rank_pattern"] == config["alpha_pattern"] and config["r"] == config["lora_alpha"]
    peft = small.loaded_by_peft(base, tmp_path / "out")
    got = small.state_of(weft.load(tmp_path / "out", base=base))
    assert small.distance(got, small.merged(peft)) < 1e-6
    with pytest.raises(UsageError, match="energy is a share"):
        extract_lora(model, base, energy=1.5)


def test_rest_and_embeddings_are_skipped_or_saved_whole(tmp_path):
    base, model = small.llama(attention_bias=True), small.llama(1, attention_bias=True)
    with torch.no_grad():
        for m in (model.model.norm.weight, model.model.layers[0].self_attn.q_proj.bias):
            m.add_(0.5)
    names = r"\.0\.self_attn\.q_proj|embed_tokens|^model\.norm"
    plain = extract_lora(model, base, rank=16, include=names)
    assert "2 changed tensors are not in the adapter" in plain.notes[0]
    made = extract_lora(model, base, rank=16, include=names, rest="save", embeddings="save")
    small.save(made, tmp_path / "out")
    got = small.merged(small.loaded_by_peft(base, tmp_path / "out"))
    ours = model.state_dict()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias",
                 "model.layers.0.self_attn.q_proj.weight"):  # fmt: skip
        assert torch.allclose(got[name].float(), ours[name], atol=1e-5), name
    assert torch.equal(got["lm_head.weight"].float(), base.state_dict()["lm_head.weight"])
    state = small.state_of(weft.load(tmp_path / "out", base=base))
    assert small.distance(state, got) < 1e-6


def test_convolutions(tmp_path):
    model, base, delta = pair((6, 3, 2, 2), rank=2)
    made = extract_lora(model, base, rank=2)
    small.save(made, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.m.lora_A.weight"].shape == (2, 3, 2, 2)
    assert tensors["base_model.model.m.lora_B.weight"].shape == (6, 2, 1, 1)
    got = weft.load(tmp_path / "out", base=base).tensor("m.weight") - base.tensor("m.weight")
    assert torch.allclose(got, delta, atol=1e-5)


def test_any_number_of_threads_writes_the_same_bytes(tmp_path):
    for threads in (1, 3):
        made = extract_lora(small.llama(1), small.llama(), rank=3, fast=True, include="_proj")
        weft.save(made, tmp_path / str(threads), threads=threads)
    one, three = ((tmp_path / str(t) / "adapter_model.safetensors").read_bytes() for t in (1, 3))
    assert one == three


def test_refusals(tmp_path):
    base, model = small.llama(), small.llama(1)
    with pytest.raises(DataError, match=r"one architecture.*\n.*layers\.1"):
        extract_lora(model, StateDict({n: t for n, t in base.state_dict().items() if "layers.1" not in n}))
    with pytest.raises(UsageError, match="does not differ"):
        extract_lora(base, base)
    with pytest.raises(UsageError, match="matches no tensor"):
        extract_lora(model, base, include="nothing")
    with pytest.raises(DataError, match=r"vLLM would not load(.|\n)*embed_tokens(.|\n)*lm_head"):
        extract_lora(model, base, rank=4, serve="vllm")
    made = extract_lora(model, base, rank=4, include="_proj", serve="vllm")
    assert "--max-lora-rank 8" in made.notes[-1]
    small.save(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    plain = extract_lora(model, base, rank=4, include="_proj")
    small.save(plain, tmp_path / "plain")
    a, b = (small.state_of(weft.load(tmp_path / d, base=base)) for d in ("out", "plain"))
    assert small.distance(a, b) == 0
    with pytest.raises(UsageError, match="cannot be added one by one"):
        made + plain
