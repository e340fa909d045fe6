"""Reducing experts: lossless where experts are copies, and less wrong by least squares than by averaging."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import taught, tiny
from moe_models import checkpoint, logits, mixture, on_disk
from torch import Tensor

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import UsageError
from weft.llm.moe.blocks import blocks_of
from weft.llm.moe.cluster import outputs, ward
from weft.llm.moe.fuse import ridge_fit
from weft.llm.moe.measure import expert_usage, gates_of, router_inputs
from weft.llm.moe.reduce import reduce_experts
from weft.llm.moe.routing import routing_of

TEXTS = [torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
KINDS = ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM"]


def doubled(model: Checkpoint) -> Checkpoint:
    """Each expert twice, the copy with its neurons in another order, and each chosen with its copy."""
    state = model.state_dict()
    wide = state[next(n for n in state if n.endswith("down_proj") and ".experts." in n)].shape[2]
    order = torch.randperm(wide, generator=torch.Generator().manual_seed(9))
    for name in list(state):
        value = state[name]
        if ".experts.gate_up_proj" in name:
            turned = torch.cat([half[:, order] for half in value.chunk(2, dim=1)], dim=1)
            state[name] = torch.stack([value, turned], 1).flatten(0, 1)
        elif ".experts.down_proj" in name:
            state[name] = torch.stack([value, value[:, :, order]], 1).flatten(0, 1)
        elif ".mlp.gate." in name:
            state[name] = value.repeat_interleave(2, dim=0)
    assert model.config is not None
    config = {k: 8 if k in ("num_local_experts", "num_experts", "n_routed_experts") else v
              for k, v in model.config.items()}  # fmt: skip
    return Model(StateDict(state), config | {"num_experts_per_tok": 4}, (), "doubled")


@pytest.mark.parametrize("how", ["mean", "frequency", "lstsq"])
@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_copies_become_one_without_loss(kind: str, how: Any) -> None:
    model = checkpoint(mixture(kind))
    twice = doubled(model)
    assert torch.allclose(logits(twice), logits(model), atol=1e-5)
    texts = None if how == "mean" else TEXTS
    made = reduce_experts(twice, 4, how, texts=texts, experts_per_token=2)
    assert all(c == [[0, 1], [2, 3], [4, 5], [6, 7]] for c in made.clusters().values())
    assert made.config is not None and made.config["num_experts_per_tok"] == 2
    assert torch.allclose(logits(made), logits(model), atol=1e-5)
    # averaged neuron by neuron as they lie, copies in another order are strangers
    careless = reduce_experts(twice, 4, how, texts=texts, experts_per_token=2, align=False)
    assert not torch.allclose(logits(careless), logits(model), atol=1e-2)


@pytest.mark.parametrize("kind", [*KINDS, "OlmoeForCausalLM", "Glm4MoeForCausalLM", "Dots1ForCausalLM"])
def test_the_written_arithmetic_is_that_of_transformers(kind: str) -> None:
    module = mixture(kind)
    model = checkpoint(module)
    caught: list[tuple[Tensor, Tensor]] = []
    hooks = [m.mlp.experts.register_forward_hook(lambda _, a, out: caught.append((a, out)))
             for m in module.model.layers if hasattr(m.mlp, "experts")]  # fmt: skip
    logits(module)
    for hook in hooks:
        hook.remove()
    for block, ((x, *_), y) in zip(blocks_of(model), caught, strict=True):
        x = x.flatten(0, -2)
        routing = routing_of(model.config)
        own = torch.einsum("te,eth->th", gates_of(block, x), outputs(block, x, routing).double())
        assert torch.allclose(own.float(), y.reshape(own.shape), atol=1e-5)


def test_groups_and_corrections_route_as_in_transformers() -> None:
    module = mixture("DeepseekV3ForCausalLM")
    model = checkpoint(module)
    inputs = router_inputs(model, TEXTS)
    (block,) = blocks_of(model)
    layer = module.model.layers[1].mlp
    with torch.no_grad():
        _, weights, index = layer.gate(inputs[block.prefix])
    wanted = torch.zeros(len(weights), 4).scatter(1, index, weights)
    assert torch.allclose(gates_of(block, inputs[block.prefix]).float(), wanted, atol=1e-6)


def test_usage_is_the_share_of_tokens_and_inputs_are_spread_evenly() -> None:
    model = checkpoint(mixture())
    inputs = router_inputs(model, TEXTS, tokens=1000)
    assert all(len(x) == 160 for x in inputs.values())
    few = router_inputs(model, TEXTS, tokens=16)
    for prefix, x in few.items():
        places = torch.linspace(0, 159, 16).round().long()
        assert torch.equal(x, inputs[prefix][places])
    for block in blocks_of(model):
        z = inputs[block.prefix].double() @ model.tensor(block.rows).double().T
        counted = torch.zeros(4, dtype=torch.float64)
        for row in z.topk(2, dim=1).indices:
            counted[row] += 1 / len(z)
        assert torch.allclose(expert_usage(model, inputs)[block.prefix], counted)


def trained() -> Checkpoint:
    from weft.llm.perplexity import read_texts

    text = read_texts(Path(weft.__file__).parent / "llm" / "sample.txt")[0]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
             "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
    return checkpoint(taught(tiny("MixtralForCausalLM", 0, **sizes), text * 2, steps=80), "trained")


def bytes_of(start: int, count: int) -> list[list[int]]:
    from weft.llm.perplexity import read_texts

    text = read_texts(Path(weft.__file__).parent / "llm" / "sample.txt")[0].encode()
    return [[min(b, 127) for b in text[i * 60 : i * 60 + 60]] for i in range(start, count, 2)]


def layer_errors(model: Checkpoint, made: Checkpoint, inputs: dict[str, Tensor]) -> list[float]:
    """‖y − y′‖ / ‖y‖ of each mixture's output on the same inputs."""
    found = []
    for a, b in zip(blocks_of(model), blocks_of(made), strict=True):
        x = inputs[a.prefix]
        y, z = (torch.einsum("te,eth->th", gates_of(k, x), outputs(k, x, routing_of(k.model.config)).double())
                for k in (a, b))  # fmt: skip
        found.append(float((y - z).norm() / y.norm()))
    return found


def test_on_a_trained_mixture_least_squares_is_nearest() -> None:
    model = trained()
    inputs = router_inputs(model, bytes_of(0, 60))
    held = router_inputs(model, bytes_of(1, 60))
    errors = {}
    for how in ("mean", "frequency", "drop", "lstsq"):
        found = [layer_errors(model, reduce_experts(model, n, how, inputs=inputs), held) for n in (5, 4, 3)]
        errors[how] = sum(map(sum, found)) / 6
    print({how: round(e, 4) for how, e in errors.items()})
    assert errors["lstsq"] < 0.9 * min(errors["frequency"], errors["drop"], errors["mean"])
    assert errors["frequency"] < errors["mean"]


def test_dropping_keeps_the_most_used(tmp_path: Path) -> None:
    model = on_disk(mixture(), tmp_path)
    prefixes = [b.prefix for b in blocks_of(model)]
    usage = {p: torch.tensor([0.1, 0.5, 0.2, 0.4]) for p in prefixes}
    made = reduce_experts(model, 2, "drop", usage=usage)
    for p in prefixes:
        for part in ("w1", "w2", "w3"):
            for new, old in enumerate((1, 3)):
                assert torch.equal(made.tensor(f"{p}.experts.{new}.{part}.weight"),
                                   model.tensor(f"{p}.experts.{old}.{part}.weight"))  # fmt: skip
        assert torch.equal(made.tensor(f"{p}.gate.weight"), model.tensor(f"{p}.gate.weight")[[1, 3]])
        assert f"{p}.experts.2.w1.weight" not in made
    assert made.config is not None and made.config["num_local_experts"] == 2
    assert torch.isfinite(logits(made)).all()


def test_both_layouts_reduce_to_the_same_and_resume_knows_them(tmp_path: Path) -> None:
    module = mixture("Qwen3MoeForCausalLM")
    split, fused = on_disk(module, tmp_path / "m"), checkpoint(module)
    made = [reduce_experts(m, 2, "frequency", texts=TEXTS) for m in (split, fused)]
    assert made[0].clusters() == made[1].clusters()
    assert torch.allclose(logits(made[0]), logits(made[1]), atol=1e-6)
    copy = pickle.loads(pickle.dumps(made[0]))
    name = next(n for n in made[0] if "experts.1.up_proj" in n)
    assert torch.equal(copy.read(name, 64, 128), made[0].read(name, 64, 128))
    assert made[0].identity() == reduce_experts(split, 2, "frequency", texts=TEXTS).identity()
    assert made[0].identity() != reduce_experts(split, 2, "mean").identity()
    saved = weft.load(weft.save(made[0], tmp_path / "out", threads=2).path)
    assert saved.config is not None and saved.config["num_local_experts"] == 2
    assert torch.equal(logits(saved), logits(made[0]))


def test_groups_stay_groups() -> None:
    model = doubled(checkpoint(mixture("DeepseekV3ForCausalLM")))
    made = reduce_experts(model, 4, "mean", experts_per_token=2)
    assert made.clusters() == {"model.layers.1.mlp": [[0, 1], [2, 3], [4, 5], [6, 7]]}
    assert torch.isfinite(logits(made)).all()
    with pytest.raises(
        UsageError, match="n must be a multiple of that, with 2 experts a group at least, not 2"
    ):
        reduce_experts(model, 2, "mean")


def test_ward_joins_the_pair_that_costs_least() -> None:
    generator = torch.Generator().manual_seed(0)
    features, usage = (
        torch.randn(5, 3, generator=generator).double(),
        torch.rand(5, generator=generator).double(),
    )

    def cost(clusters: list[list[int]]) -> float:
        total = 0.0
        for c in clusters:
            mean = (usage[c, None] * features[c]).sum(0) / usage[c].sum()
            total += float((usage[c, None] * (features[c] - mean).square()).sum())
        return total

    def joined(clusters: list[list[int]], i: int, j: int) -> list[list[int]]:
        return sorted([*(c for k, c in enumerate(clusters) if k not in (i, j)),
                       sorted(clusters[i] + clusters[j])])  # fmt: skip

    clusters = [[e] for e in range(5)]
    for n in (4, 3, 2, 1):
        clusters = min((joined(clusters, i, j) for j in range(len(clusters)) for i in range(j)), key=cost)
        assert ward(features, usage, n) == clusters


@pytest.mark.parametrize(("rows", "columns"), [(20, 6), (6, 20)])
def test_the_ridge_solution_has_no_gradient(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (columns, 3))
    w = ridge_fit(x, y, 0.1).requires_grad_(True)
    loss = (x @ w.T - y).square().sum() + 0.1 * x.square().sum() / rows * w.square().sum()
    loss.backward()
    assert w.grad is not None and float(w.grad.abs().max()) < 1e-10


def test_what_cannot_be_reduced() -> None:
    model = checkpoint(mixture(), "m")
    for n, keys, message in (
        (5, {}, "m has 4 experts a layer: it cannot be reduced to 5"),
        (2, {"how": "frequnecy"}, "did you mean 'frequency'"),
        (2, {"how": "lstsq"}, "least squares needs inputs"),
        (2, {"how": "drop"}, "drop needs to know how often each expert is used"),
        (2, {"how": "mean", "experts_per_token": 3}, "3 experts per token cannot be chosen from 2"),
        (2, {"how": "drop", "usage": {}}, "usage say nothing of model.layers.0.mlp"),
        (2, {"how": "frequency", "texts": []}, "hold no token"),
        (2, {"how": "frequency", "texts": ["words"]}, "has no tokenizer to read the texts with"),
    ):
        with pytest.raises(UsageError, match=message):
            reduce_experts(model, n, **keys)  # type: ignore[arg-type]
    odd = Model(StateDict(model.state_dict()), dict(model.config or {}) | {"model_type": "phimoe"}, (), "odd")
    with pytest.raises(UsageError, match="how a phimoe routes is not known; known are"):
        reduce_experts(odd, 2, "mean")
    usage = {b.prefix: torch.tensor([0.4, 0.1, 0.3, 0.2]) for b in blocks_of(odd)}
    kept = reduce_experts(odd, 2, "drop", usage=usage)  # which needs no arithmetic
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(kept.tensor(name), odd.tensor(name)[[0, 2]])


def test_the_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from weft.cli.main import app

    on_disk(mixture(), tmp_path / "m")
    done = CliRunner().invoke(app, ["moe", "reduce", str(tmp_path / "m"), str(tmp_path / "out"), "--experts", "2",
                                    "--how", "mean", "--experts-per-token", "1"])  # fmt: skip
    assert done.exit_code == 0, done.output
    made = weft.load(tmp_path / "out")
    assert made.config is not None and made.config["num_local_experts"] == 2
    assert made.config["num_experts_per_tok"] == 1 and torch.isfinite(logits(made)).all()
