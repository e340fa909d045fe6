"""What is written: PEFT's names, ranks, scales and configs, experts, kohya's files; resizing and looking."""

import copy
import json

import adapter_models as small
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_adapter_inputs import LLAMA, Moe, image_base, image_file

import weft
from weft.adapters.extract import extract_lora
from weft.adapters.factors import Factors, Slot, as_adapter
from weft.adapters.inspect import inspect_adapter, shared, totals
from weft.adapters.output import adapter_checkpoint
from weft.adapters.resize import resize_lora
from weft.checkpoints.adapted import Adapted
from weft.checkpoints.adapters import load_adapter
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError


def random_slots(ranks, out=5, inputs=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    slots = {name: Slot(r, (out, inputs)) for name, r in ranks.items()}
    made = {}
    for name, r in ranks.items():
        b, a = torch.randn(out, r, generator=g), torch.randn(r, inputs, generator=g)
        made[name] = Factors(b.double(), a.double(), (out, inputs))
    return slots, made


def test_the_card_says_that_it_is_an_adapter_of_its_base(tmp_path):
    slots, made = random_slots({"q.weight": 2})
    small.save(
        adapter_checkpoint(slots, made.__getitem__, origin="made", base_name="org/base"), tmp_path / "out"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "- org/base" in card and "base_model_relation: adapter" in card
    assert sorted(f.name for f in (tmp_path / "out").iterdir() if "weft" not in f.name) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_a_rank_pattern_reaches_its_own_module_only(tmp_path):
    """PEFT's patterns also match the end of a longer name."""
    ranks = {"q.weight": 3, "a.q.weight": 2, "b.q.weight": 2, "c.a.q.weight": 1, "d.weight": 2}
    slots, made = random_slots(ranks)
    small.save(adapter_checkpoint(slots, made.__getitem__, origin="made"), tmp_path / "out")
    adapter = as_adapter(tmp_path / "out")  # refuses where a pattern contradicts a tensor
    assert {n: adapter.rank(n) for n in adapter.names} == ranks
    assert {adapter.scale(n) for n in adapter.names} == {1.0}
    for n in ranks:
        assert torch.allclose(adapter.factors(n).delta(), made[n].delta(), atol=1e-6)


def test_lower_ranks_are_padded_and_each_weight_is_computed_once(tmp_path):
    slots, made = random_slots({f"m{i}.weight": 3 for i in range(40)})
    calls = []

    def compute(name):
        calls.append(name)
        f = made[name]
        return Factors(f.b[:, :1], f.a[:1], f.shape)

    small.save(adapter_checkpoint(slots, compute, origin="made"), tmp_path / "out")
    assert sorted(calls) == sorted(slots)
    adapter = as_adapter(tmp_path / "out")
    for n in slots:
        assert adapter.rank(n) == 3
        assert torch.allclose(adapter.factors(n).delta(), made[n].b[:, :1] @ made[n].a[:1], atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_as_peft_nests_them(tmp_path, turned):
    model = Moe(turned)
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.experts.parameters():
            p.add_(torch.randn(p.shape, generator=g))
    base = StateDict(model, "base")
    kinds = {n: ("transposed experts" if turned else "experts") for n in base if n.startswith("experts")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("weft.adapters.extract.kinds", lambda _: kinds)
        made = extract_lora(other, base, rank=5)
    small.save(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    peft = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    want, got = small.merged(peft), other.state_dict()
    for name in got:
        assert torch.allclose(want[name].float(), got[name], atol=1e-5), name
    mine = Adapted(base, load_adapter(tmp_path / "out"))
    assert small.distance(small.state_of(mine), got) < 1e-5


def test_lora_bias(tmp_path):
    model = small.llama(attention_bias=True)
    peft = small.adapted(model, LLAMA["bias"])
    small.written(peft, tmp_path / "in")
    small.save(resize_lora(tmp_path / "in", rank=3), tmp_path / "out")
    assert (
        small.distance(small.merged(small.loaded_by_peft(model, tmp_path / "out")), small.merged(peft)) < 1e-5
    )


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_other_kinds_become_lora(tmp_path, kind):
    model = small.llama()
    peft = small.adapted(model, LLAMA[kind])
    small.written(peft, tmp_path / "in")
    made = resize_lora(tmp_path / "in", energy=1.0, base=weft.load(model))
    small.save(made, tmp_path / "out")
    assert max(r["error"] for r in made.report.values()) < 1e-7
    assert (
        small.distance(small.merged(small.loaded_by_peft(model, tmp_path / "out")), small.merged(peft)) < 1e-5
    )


def test_resizing_is_the_best_approximation_and_tells_its_error(tmp_path):
    model = small.llama()
    small.written(small.lora(model, r=6), tmp_path / "in")
    before = as_adapter(tmp_path / "in")
    for settings in ({"rank": 2}, {"energy": 0.8}, {"ratio": 0.5}, {"threshold": 1.0}):
        made = resize_lora(before, **settings)
        after = as_adapter(made)
        for name in before.names:
            delta = before.factors(name).delta()
            s = torch.linalg.svdvals(delta)
            r = after.rank(name)
            error = float((after.factors(name).delta() - delta).norm() / delta.norm())
            assert error == pytest.approx(float(s[r:].norm() / s.norm()), abs=1e-7)
            assert made.report[name]["error"] == pytest.approx(error, abs=1e-7)
            kept = float(s[:r].square().sum() / s.square().sum())
            less = float(s[: r - 1].square().sum() / s.square().sum())
            if "energy" in settings:
                assert kept >= 0.8 and (less < 0.8 or r == 1)
            if "ratio" in settings:
                assert r == max(1, int((s >= 0.5 * s[0]).sum()))
            if "threshold" in settings:
                assert r == max(1, int((s >= 1.0).sum()))
            if "rank" in settings:
                assert r == 2
    with pytest.raises(UsageError, match="say what to keep"):
        resize_lora(before)


def test_dora_and_ia3_are_not_resized(tmp_path):
    model = small.llama()
    for kind in ("dora", "ia3"):
        small.written(small.adapted(model, LLAMA[kind]), tmp_path / kind)
        with pytest.raises(UsageError, match="is scaled, not only added to"):
            resize_lora(tmp_path / kind, rank=1)
    # … but the difference that it makes can be extracted
    whole = weft.load(tmp_path / "dora", base=model)
    made = extract_lora(whole, model, energy=1.0)
    small.save(made, tmp_path / "out")
    assert (
        small.distance(small.state_of(weft.load(tmp_path / "out", base=model)), small.state_of(whole)) < 1e-5
    )


def test_kohya_in_and_out(tmp_path):
    state, g = image_base(), torch.Generator().manual_seed(4)
    tensors = {
        "lora_unet_in_blocks_1_0_to_q.lora_down.weight": torch.randn(2, 4, generator=g),
        "lora_unet_in_blocks_1_0_to_q.lora_up.weight": torch.randn(6, 2, generator=g),
        "lora_unet_in_blocks_1_0_to_q.alpha": torch.tensor(1.0),
        "lora_unet_mid_block_proj.lora_down.weight": torch.randn(2, 3, generator=g),
        "lora_unet_mid_block_proj.lora_up.weight": torch.randn(5, 2, generator=g),
    }
    path = image_file(tmp_path / "in.safetensors", tensors)
    base = StateDict(state, "base")
    want = small.state_of(Adapted(base, load_adapter(path)))
    with pytest.raises(UsageError, match="underscores for dots"):
        resize_lora(path, rank=2)
    small.save(resize_lora(path, rank=2, layout="kohya"), tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert written["lora_unet_in_blocks_1_0_to_q.alpha"] == 2.0 and written.keys() >= tensors.keys()
    assert (
        small.distance(small.state_of(Adapted(base, load_adapter(tmp_path / "out.safetensors"))), want) < 1e-6
    )
    # with the base the names are the base's, so that PEFT can load it
    small.save(resize_lora(path, rank=2, base=base), tmp_path / "peft")
    assert small.distance(small.state_of(weft.load(tmp_path / "peft", base=base)), want) < 1e-6


def test_looking(tmp_path):
    model = small.llama()
    small.written(small.lora(model, use_rslora=True), tmp_path / "a")
    small.written(small.lora(model, seed=2), tmp_path / "b")
    adapter, other = as_adapter(tmp_path / "a"), as_adapter(tmp_path / "b")
    report = {r.name: r for r in inspect_adapter(adapter)}
    for name, r in report.items():
        s = torch.linalg.svdvals(adapter.factors(name).delta())
        assert (r.norm, r.largest) == (pytest.approx(float(s.norm())), pytest.approx(float(s[0])))
        kept = s.square().cumsum(0) / s.square().sum()
        assert r.energy90 == int((kept < 0.9).sum()) + 1 and (r.rank, r.scale) == (4, 3.0)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert totals(list(report.values()))[1] == sum(t.numel() for t in tensors.values())
    one, two = (torch.cat([x.factors(n).delta().flatten() for n in report]) for x in (adapter, other))
    found = shared(adapter, other)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(one, two, 0)), abs=1e-9)
    assert found.a_overlap < 0.6 and shared(adapter, adapter).a_overlap == pytest.approx(1)
    with pytest.raises(UsageError, match=r"did you mean 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        adapter.factors("model.layers.0.self_attn.k_proj.weight")


def test_an_adapter_for_another_base_is_refused(tmp_path):
    small.written(small.lora(small.llama()), tmp_path / "a")
    with pytest.raises(DataError, match="does not fit"):
        as_adapter(tmp_path / "a", weft.load(small.gpt2()))
