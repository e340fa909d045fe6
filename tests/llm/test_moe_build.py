"""Mixtures of dense models: exact where they must be, gates as the formulas say, every bad recipe refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import IDS, MLA, checkpoint, dense, logits, word_tokenizer

import weft
from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, DataProblems, Problems, UsageError
from weft.llm.moe.build import build_moe
from weft.llm.moe.families import DENSE_DEFAULTS, FAMILIES
from weft.llm.moe.gates import condition

transformers = pytest.importorskip("transformers")

LAW = {
    "mixtral": ("LlamaForCausalLM", {"rope_theta": 5000.0}),
    "mixtral of mistral": ("MistralForCausalLM", {"sliding_window": 4}),
    "qwen2_moe": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 3,
                                       "max_window_layers": 1}),
    "qwen3_moe": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "glm4_moe of llama": ("LlamaForCausalLM", {}),
    "glm4_moe of qwen2": ("Qwen2ForCausalLM", {}),
    "glm4_moe of qwen3": ("Qwen3ForCausalLM", {"head_dim": 8}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", MLA),
    "deepseek_v2": ("DeepseekV2ForCausalLM", MLA),
}  # fmt: skip
SILENT = [{"source_model": "m", "residual_scale": 0.0}]


def recipe(**keys: Any) -> dict[str, Any]:
    return {"base_model": "m", "experts": [{"source_model": "m"}] * 3, "gate_mode": "random", **keys}


def built(data: Any, **models: Checkpoint) -> Any:
    return build_moe(data, loader=lambda ref: models[str(ref)])


@pytest.mark.parametrize("layout", ["split", "fused"])
@pytest.mark.parametrize("case", LAW)
def test_identical_experts_compute_the_dense_model(case: str, layout: str) -> None:
    kind, config = LAW[case]
    family = next(f for f in FAMILIES if f.name == case.split()[0])
    module = dense(kind, **config)
    # where the chosen weights are not normalised only all of them sum to one
    data = recipe(architecture=family.name, layout=layout, experts_per_token=2 if family.normalises else 3)
    if family.shared:
        data["shared_experts"] = SILENT
    made = built(data, m=checkpoint(module))
    assert torch.allclose(logits(made.checkpoint), logits(module), atol=1e-5)


def test_a_router_that_does_not_normalise_loses_what_it_does_not_choose() -> None:
    module = dense("DeepseekV2ForCausalLM", **MLA)
    made = built(recipe(shared_experts=SILENT, experts_per_token=1), m=checkpoint(module))
    assert not torch.allclose(logits(made.checkpoint), logits(module), atol=1e-3)
    assert any("does not normalise" in n for n in made.notes)


def test_half_a_shared_expert_and_half_the_chosen_are_one_dense_model() -> None:
    # a shared gate of zeros weighs the shared expert by one half, and the router's sum to one
    module = dense("Qwen2ForCausalLM")
    half = [{"source_model": "m", "residual_scale": 0.5}] * 3
    made = built(
        recipe(experts=half, shared_experts=[{"source_model": "m"}]), m=checkpoint(module)
    ).checkpoint
    state = made.state_dict()
    state = {n: torch.zeros_like(v) if "shared_expert_gate" in n else v for n, v in state.items()}
    from weft.checkpoints.memory import StateDict
    from weft.checkpoints.model import Model

    assert torch.allclose(logits(Model(StateDict(state), made.config, (), "half")), logits(module), atol=1e-5)


def test_each_expert_is_its_model(tmp_path: Path) -> None:
    models = {n: checkpoint(dense("LlamaForCausalLM", i), n) for i, n in enumerate("mabc")}
    data = recipe(experts=[{"source_model": n} for n in "abc"], experts_per_token=1)
    split, fused = built(data, **models).checkpoint, built(data | {"layout": "fused"}, **models).checkpoint
    for i, n in enumerate("abc"):
        theirs = {p: models[n].tensor(f"model.layers.1.mlp.{p}_proj.weight") for p in ("gate", "up", "down")}
        for part, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            assert torch.equal(split.tensor(f"model.layers.1.block_sparse_moe.experts.{i}.{w}.weight"),
                               theirs[part])  # fmt: skip
        both = fused.tensor("model.layers.1.mlp.experts.gate_up_proj")[i]
        assert torch.equal(both, torch.cat([theirs["gate"], theirs["up"]]))
        assert torch.equal(fused.tensor("model.layers.1.mlp.experts.down_proj")[i], theirs["down"])
    assert torch.equal(logits(split), logits(fused))
    # the one expert that every token goes to is that expert's MLPs in the base's attention
    hybrid = dense("LlamaForCausalLM", 0)
    hybrid.load_state_dict(models["b"].state_dict() | {
        n: v for n, v in models["m"].state_dict().items() if ".mlp." not in n})  # fmt: skip
    one = built(data | {"experts": [{"source_model": "b"}]}, **models).checkpoint
    assert torch.allclose(logits(one), logits(hybrid), atol=1e-5)
    saved = weft.save(split, tmp_path / "out", memory="64MiB", threads=2).path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert torch.equal(logits(loaded.eval()), logits(split))


def test_scale_and_noise() -> None:
    module = checkpoint(dense("LlamaForCausalLM"))
    experts = [{"source_model": "m", "residual_scale": 0.5}, {"source_model": "m", "noise_scale": 0.01},
               {"source_model": "m", "noise_scale": 0.01}]  # fmt: skip
    made = built(recipe(experts=experts, seed=3), m=module).checkpoint
    name = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    down, up = (module.tensor(f"model.layers.0.mlp.{p}_proj.weight") for p in ("down", "up"))
    assert torch.equal(made.tensor(name.format(0, "w2"), dtype=torch.float32), down / 2)
    assert torch.equal(made.tensor(name.format(0, "w3")), up)
    noise = [made.tensor(name.format(e, "w3"), dtype=torch.float32) - up for e in (1, 2)]
    assert all(abs(float(n.std()) - 0.01) < 0.001 and abs(float(n.mean())) < 0.001 for n in noise)
    assert not torch.allclose(noise[0], noise[1])
    again = built(recipe(experts=experts, seed=3), m=module).checkpoint
    pieces = torch.cat([again.read(name.format(1, "w3"), a, a + 96) for a in range(0, 1536, 96)])
    assert torch.equal(pieces, made.read(name.format(1, "w3")))


PROMPTS = [["sum add", "proof"], ["code python loop"], ["rose love"]]
PROMPTED = [{"source_model": "m", "positive_prompts": p} for p in PROMPTS]


def vocabulary() -> dict[str, int]:
    return json.loads(word_tokenizer()[0].read())["model"]["vocab"]


def test_hidden_gates_are_the_states_that_the_router_will_see() -> None:
    module = dense("LlamaForCausalLM")
    base = checkpoint(module, assets=word_tokenizer())
    experts = [*PROMPTED[:2], PROMPTED[2] | {"negative_prompts": ["sum add"]}]
    seen: list[torch.Tensor] = []
    layers = module.model.layers
    hooks = [x.mlp.register_forward_pre_hook(lambda _, a: seen.append(a[0][0].double())) for x in layers]

    def states(prompt: str, average: bool) -> torch.Tensor:
        seen.clear()
        with torch.no_grad():
            module(torch.tensor([[vocabulary()[w] for w in prompt.split()]]))
        return torch.stack([s.mean(0) if average else s[-1] for s in seen])

    for mode, average in (("hidden", False), ("hidden_last", False), ("hidden_avg", True)):
        gates = built(recipe(experts=experts, gate_mode=mode), m=base).gates
        wanted = [torch.stack([states(p, average) for p in prompts]).mean(0) for prompts in PROMPTS]
        wanted[2] = wanted[2] - states("sum add", average)
        reference = torch.stack(wanted, 1)
        reference = reference / reference.norm(dim=-1, keepdim=True)
        assert torch.allclose(gates.double(), reference, atol=1e-5)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        out = module(torch.tensor([[vocabulary()["rose"], vocabulary()["love"]]]), output_hidden_states=True)
    theirs = torch.stack([h[0, -1] for h in out.hidden_states[:-1]])
    gates = built(recipe(experts=PROMPTED, gate_mode="hidden", compat="mergekit"), m=base).gates
    assert torch.allclose(gates[:, 2], theirs / theirs.norm(dim=-1, keepdim=True), atol=1e-5)


def test_prompts_route_their_own_tokens_to_their_expert() -> None:
    base = checkpoint(dense("LlamaForCausalLM"), assets=word_tokenizer())
    made = built(recipe(experts=PROMPTED, gate_mode="hidden", experts_per_token=1), m=base)
    from weft.llm.moe.blocks import blocks_of
    from weft.llm.moe.measure import gates_of, router_inputs

    for i, prompts in enumerate(PROMPTS):
        ids = [[vocabulary()[w] for w in p.split()] for p in prompts[:1]]
        inputs = router_inputs(made.checkpoint, ids)
        block = blocks_of(made.checkpoint)[0]
        assert int(gates_of(block, inputs[block.prefix])[-1].argmax()) == i


def test_cheap_embeddings() -> None:
    base = checkpoint(dense("LlamaForCausalLM"), assets=word_tokenizer())
    gates = built(recipe(experts=PROMPTED, gate_mode="cheap_embed"), m=base).gates
    table = base.tensor("model.embed_tokens.weight").double()
    for i, prompts in enumerate(PROMPTS):
        total = sum(table[vocabulary()[w]] for p in prompts for w in p.split())
        assert torch.allclose(gates[:, i].double(), (total / total.norm()).expand(2, -1), atol=1e-6)


def test_random_gates_have_the_stated_spread_and_follow_the_seed() -> None:
    base = checkpoint(dense("LlamaForCausalLM"))
    gates = built(recipe(experts=[{"source_model": "m"}] * 40), m=base).gates
    assert abs(float(gates.std()) - 0.02) < 0.001
    uniform = built(recipe(gate_mode="uniform_random"), m=base).gates
    assert float(uniform.abs().max()) <= 32**-0.5 < 1.1 * float(uniform.abs().max())
    assert torch.equal(uniform, built(recipe(gate_mode="uniform_random"), m=base).gates)
    assert not torch.equal(uniform, built(recipe(gate_mode="uniform_random", seed=1), m=base).gates)


def test_the_report_names_prompts_that_are_alike() -> None:
    base = checkpoint(dense("LlamaForCausalLM"), assets=word_tokenizer())
    same = [PROMPTED[0], PROMPTED[1], PROMPTED[0]]
    made = built(recipe(experts=same, gate_mode="hidden"), m=base)
    assert made.condition == [float("inf")] * 2
    assert any("experts 0 and 2 are near-identical" in n for n in made.notes)
    assert any("condition number" in n for n in made.notes)
    gates = torch.diag(torch.tensor([4.0, 1.0]))[None]
    assert condition(gates) == pytest.approx([4.0])


def test_sources_may_be_adapted_models_and_recipes(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    weft.save(checkpoint(dense("LlamaForCausalLM", 0)), tmp_path / "m")
    weft.save(checkpoint(dense("LlamaForCausalLM", 1)), tmp_path / "n")
    wrapped = peft.get_peft_model(dense("LlamaForCausalLM", 0), peft.LoraConfig(
        r=2, target_modules=["up_proj"], init_lora_weights=False))  # fmt: skip
    wrapped.save_pretrained(tmp_path / "lora")
    m, n, lora = (str(tmp_path / p) for p in ("m", "n", "lora"))
    nested = {"merge_method": "linear", "models": [m, n]}
    made = build_moe({"base_model": m, "gate_mode": "random", "experts": [
        {"source_model": f"{m}+{lora}"}, {"source_model": nested}]}).checkpoint  # fmt: skip
    name, theirs = "model.layers.0.block_sparse_moe.experts.{}.w3.weight", "model.layers.0.mlp.up_proj.weight"
    adapted = wrapped.merge_and_unload().state_dict()[theirs]
    assert torch.allclose(made.tensor(name.format(0), dtype=torch.float32), adapted, atol=1e-6)
    mean = (weft.load(m).tensor(theirs) + weft.load(n).tensor(theirs)) / 2
    assert torch.allclose(made.tensor(name.format(1), dtype=torch.float32), mean, atol=1e-6)


def test_deepseek_moe_computes_the_dense_model_by_its_own_arithmetic() -> None:
    # transformers lacks the class, so its block is written out here and put into the dense model
    module = dense("LlamaForCausalLM")
    made = built(recipe(architecture="deepseek", experts_per_token=2), m=checkpoint(module))
    assert made.checkpoint.config["model_type"] == "deepseek" and made.checkpoint.config["norm_topk_prob"]
    state = made.checkpoint.state_dict()
    wanted = logits(module)

    def block(layer: int) -> Any:
        p = f"model.layers.{layer}.mlp."

        def forward(x: torch.Tensor) -> torch.Tensor:
            score = (x @ state[f"{p}gate.weight"].T).softmax(-1)
            value, index = score.topk(2, dim=-1)
            weight = torch.zeros_like(score).scatter(-1, index, value / value.sum(-1, keepdim=True))
            out = 0
            for e in range(3):
                g, u, d = (state[f"{p}experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down"))
                out = out + weight[..., e, None] * ((torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T)
            return out

        return forward

    for i, layer in enumerate(module.model.layers):
        layer.mlp.forward = block(i)
    assert torch.allclose(logits(module), wanted, atol=1e-5)
    assert any("transformers has no deepseek" in n for n in made.notes)


@pytest.mark.parametrize("kind", DENSE_DEFAULTS)
def test_what_a_silent_config_means_is_what_the_class_assumes(kind: str) -> None:
    config = transformers.CONFIG_MAPPING[kind]()
    for key, value in DENSE_DEFAULTS[kind].items():
        if key == "rope_theta":
            assert config.rope_parameters["rope_theta"] == value
        elif value is not None and key != "sliding_window":
            assert getattr(config, key) == value, key


def test_a_silent_config_becomes_a_mixture_that_computes_the_same() -> None:
    module = dense("LlamaForCausalLM", num_key_value_heads=4)
    from weft.checkpoints.model import Model

    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = {k: getattr(module.config, k) for k in keys} | {"model_type": "llama"}
    silent = Model(checkpoint(module), config, (), "silent")
    assert torch.allclose(logits(built(recipe(), m=silent).checkpoint), logits(module), atol=1e-5)


BAD = [
    ({"expert": []}, "unknown key; did you mean 'experts'?"),
    ({"experts": [{"source_model": "m", "positive_prompt": ["x"]}]}, "did you mean 'positive_prompts'?"),
    ({"gate_mode": "hiden"}, "did you mean 'hidden'?"),
    ({"experts_per_token": 4}, "is 4, but there are 3 experts to choose from"),
    ({"gate_mode": "hidden"}, "positive_prompts are missing"),
    ({"gate_mode": "hidden", "experts": [{"source_model": "m", "negative_prompts": ["x"]}] * 2},
     "positive_prompts must say what it is for"),
    ({"shared_experts": [{"source_model": "m"}] * 2}, "one shared expert at most"),
    ({"layout": "stacked"}, "must be 'split' or 'fused'"),
    ({"dtype": "float17"}, "unknown dtype"),
    ({"experts": [{"source_model": {"merge_method": "tis", "models": ["m"]}}] * 2}, "did you mean 'ties'?"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_recipes_are_refused_before_anything_is_opened(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(Problems) as error:
        build_moe(recipe(**keys), loader=lambda ref: pytest.fail("opened"))
    assert message in str(error.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(Problems) as error:
        build_moe(recipe(experts_per_token=9, dtype="x", gate_mode="hidden"), loader=lambda ref: None)
    assert len(error.value.problems) == 5


def test_models_that_do_not_fit_are_named() -> None:
    base = checkpoint(dense("LlamaForCausalLM"))
    others = {
        "thin": checkpoint(dense("LlamaForCausalLM", hidden_size=16)),
        "deep": checkpoint(dense("LlamaForCausalLM", num_hidden_layers=3)),
        "wide": checkpoint(dense("LlamaForCausalLM", intermediate_size=40)),
        "gelu": checkpoint(dense("LlamaForCausalLM", hidden_act="gelu")),
    }
    experts = [{"source_model": n} for n in ("m", *others)]
    with pytest.raises(DataProblems) as error:
        built(recipe(experts=experts), m=base, **others)
    told = "\n".join(error.value.problems)
    assert len(error.value.problems) == 4
    assert "(thin): model.layers.0.mlp.gate_proj.weight has shape [48, 16] where [48, 32] fits" in told
    assert "(deep) has 3 layers, base_model has 2" in told
    assert "(wide) has MLPs 40 wide" in told and "(gelu) has the activation gelu" in told


def test_families_say_what_keeps_them() -> None:
    llama, qwen = checkpoint(dense("LlamaForCausalLM")), checkpoint(dense("Qwen2ForCausalLM"))
    with pytest.raises(UsageError, match="there is no mixture 'mixtrl'; did you mean 'mixtral'"):
        built(recipe(architecture="mixtrl"), m=llama)
    with pytest.raises(UsageError, match="qwen2_moe: it needs a shared expert: add one model"):
        built(recipe(), m=qwen)
    with pytest.raises(UsageError, match="mixtral: its attention is that of llama, mistral, not of qwen2"):
        built(recipe(architecture="mixtral"), m=qwen)
    with pytest.raises(UsageError, match=r"it has no place for self_attn\.k_proj\.bias"):
        built(recipe(), m=checkpoint(dense("LlamaForCausalLM", attention_bias=True)))
    with pytest.raises(UsageError, match="sliding window in all layers, which a glm4_moe cannot have"):
        mistral = checkpoint(dense("MistralForCausalLM", sliding_window=4))
        built(recipe(shared_experts=SILENT), m=mistral)
    with pytest.raises(UsageError, match="is of type 'gpt2'; mixtures can be made of"):
        built(recipe(), m=checkpoint(dense("GPT2LMHeadModel", n_layer=2, n_head=4, n_embd=32)))
    with pytest.raises(UsageError, match="so there is no fused layout of it"):
        built(recipe(architecture="deepseek", layout="fused"), m=llama)


def test_prompts_need_a_tokenizer_and_a_mixture_is_no_base() -> None:
    with pytest.raises(UsageError, match="has no tokenizer to read the prompts with"):
        built(recipe(experts=PROMPTED, gate_mode="hidden"), m=checkpoint(dense("LlamaForCausalLM")))
    whole = built(recipe(), m=checkpoint(dense("LlamaForCausalLM"))).checkpoint
    with pytest.raises(UsageError, match="is a mixture already"):
        built(recipe(), m=whole)
    with pytest.raises(DataError, match=r"experts\[0\] \(x\) is a mixture already"):
        built(recipe(experts=[{"source_model": "x"}] * 2), m=checkpoint(dense("LlamaForCausalLM")), x=whole)


def test_shared_experts_take_prompts_exactly_where_they_have_a_gate() -> None:
    qwen = checkpoint(dense("Qwen2ForCausalLM"), assets=word_tokenizer())
    with pytest.raises(UsageError, match="shared expert is made of them"):
        built(recipe(experts=PROMPTED, gate_mode="hidden", shared_experts=SILENT), m=qwen)
    llama = checkpoint(dense("LlamaForCausalLM"), assets=word_tokenizer())
    with pytest.raises(UsageError, match="shared expert has no gate, so it takes no prompts"):
        shared = [SILENT[0] | {"positive_prompts": ["sum"]}]
        built(recipe(experts=PROMPTED, gate_mode="hidden", shared_experts=shared), m=llama)


def test_the_command_builds_what_mergekit_would_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from weft.cli.main import app

    weft.save(checkpoint(dense("LlamaForCausalLM"), assets=word_tokenizer()), tmp_path / "m")
    lines = [f"base_model: {tmp_path / 'm'}", "gate_mode: hidden", "dtype: bfloat16", "experts:"]
    for prompts in PROMPTS[:2]:
        lines += [f"  - source_model: {tmp_path / 'm'}", "    positive_prompts:",
                  *(f'      - "{p}"' for p in prompts)]  # fmt: skip
    (tmp_path / "moe.yml").write_text("\n".join(lines) + "\n")
    done = CliRunner().invoke(app, ["moe", str(tmp_path / "moe.yml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    made = weft.load(tmp_path / "out")
    assert made.config["num_local_experts"] == 2 and made.config["model_type"] == "mixtral"
    assert made.info("model.layers.0.block_sparse_moe.gate.weight").dtype == torch.bfloat16
    assert torch.isfinite(logits(made, IDS % 10)).all()
    assert (
        json.loads((tmp_path / "out" / "weft-manifest.json").read_text())["recipe"]["moe"]["gate_mode"]
        == "hidden"
    )


def test_the_recipe_of_the_documentation_reads() -> None:
    import re

    from weft.llm.moe.recipe import read_mixture

    page = (Path(__file__).parents[2] / "docs" / "moe.md").read_text(encoding="utf-8")
    fence = re.search(r"```text\n(base_model:.*?)```", page, re.DOTALL)
    assert fence is not None
    made = read_mixture(fence[1])
    assert made.gate_mode == "hidden" and made.experts[0].negative == ("Write a poem",)
    assert read_mixture(fence[1], ["experts_per_token=1"]).experts_per_token == 1
