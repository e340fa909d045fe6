"""Rotations and scales: found, exact, recovered by matching, on tiny transformers of real architectures."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import KINDS as NETWORKS
from networks import made as network
from networks import mlp
from torch import Tensor, nn

import weft
from weft.align import (
    PermutationSpec,
    Symmetries,
    agreement,
    discover,
    reordered,
    symmetries,
    weight_matching,
)
from weft.align.discovery import _call, _logits
from weft.errors import DataError, DataProblems, Problems, UsageError

TINY = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    # model class, config, how many laws of each kind there are
    "llama": ("LlamaForCausalLM", {**TINY, "vocab_size": 40, "num_key_value_heads": 2},
              {"planes": 2, "linear": 2, "scale": 5 + 2, "orthogonal": 1}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": 40, "n_positions": 16},
             {"linear": 4, "scale": 4}),
    "gpt2, untied": ("GPT2LMHeadModel", {"n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": 40,
                                         "n_positions": 16, "tie_word_embeddings": False},
                     {"linear": 4, "scale": 5, "centred": 1}),
    "vit": ("ViTForImageClassification", {**TINY, "image_size": 8, "patch_size": 4, "num_labels": 5},
            {"linear": 4, "scale": 5, "centred": 1}),
    "bert": ("BertForSequenceClassification", {**TINY, "vocab_size": 40, "max_position_embeddings": 16},
             {"linear": 4, "scale": 1}),
}  # fmt: skip


@lru_cache
def made(kind: str) -> tuple[nn.Module, PermutationSpec, Symmetries]:
    """In float64, every weight shaken, with its permutations and its laws."""
    transformers = pytest.importorskip("transformers")
    name, config, _ = KINDS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    net = cls(cls.config_class(**config)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    spec = discover(net)
    return net, spec, symmetries(net, spec=spec)


def outputs(net: nn.Module, state: dict[str, Tensor]) -> Tensor:
    args, kwargs = _call(net, None)
    own = {n: state[n] for n, _ in net.named_parameters()}
    with torch.no_grad():
        result = _logits(torch.func.functional_call(net, own, args, kwargs))
    return next(iter(result.values())) if isinstance(result, dict) else result


def change(net: nn.Module, model: Any) -> float:
    """Of the outputs, relative to their largest."""
    before, after = (outputs(net, weft.load(m).state_dict()) for m in (net, model))
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_every_exact_law_is_found_and_no_other(kind: str) -> None:
    net, _, laws = made(kind)
    counts: dict[str, int] = {}
    for law in laws.laws.values():
        counts[law.kind] = counts.get(law.kind, 0) + 1
    assert counts == KINDS[kind][2]
    for seed in (0, 1):
        drawn = laws.random(seed)
        assert change(net, laws.apply(net, drawn)) < 1e-5
        for n, m in drawn.items():  # each moves something
            moved = laws.apply(net, {n: m})
            assert agreement(made(kind)[1], net, moved) < 0.9999
    assert change(net, laws.folded(net)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_turned_and_permuted_model_comes_back(kind: str) -> None:
    net, spec, laws = made(kind)
    state = dict(net.state_dict())
    other = reordered(laws.apply(net, laws.random(5)).state_dict(), spec, spec.random(5))
    found = weft.align(other, to=net, how="rotations", module=net, symmetries=laws, spec=spec)
    permuted = spec.apply(other, weight_matching(spec, net, other))
    # keys' biases change nothing that is computed, so that no law moves them
    assert agreement(spec, net, found) > 0.99 > 0.6 > agreement(spec, net, permuted)
    assert change(net, found) < 1e-5
    assert change(net, weft.merge([state, found], "linear")) < 1e-5
    assert change(net, weft.merge([state, permuted], "linear")) > 0.1


@pytest.mark.parametrize("kind", NETWORKS)
def test_laws_of_every_kind_of_network_are_exact(kind: str) -> None:
    net, x = network(kind), NETWORKS[kind].inputs
    laws = symmetries(net, x)
    counts = {k: sum(law.kind == k for law in laws.laws.values()) for k in ("scale", "linear")}
    assert (counts["scale"], counts["linear"]) == {
        "mlp": (2, 0), "vgg": (3, 0), "resnet": (6, 0), "resnext": (5, 0), "mobile": (2, 1), "joined": (2, 1),
        "encoder": (1, 4), "tied": (0, 0), "shuffled": (2, 0), "recurrent": (0, 0),
    }[kind]  # fmt: skip
    moved = laws.apply(net, laws.random(0)).state_dict()
    with torch.no_grad():
        after = torch.func.functional_call(net, moved, (x,), tie_weights=False)
        torch.testing.assert_close(after, net(x), rtol=0, atol=1e-9)


def test_scales_of_hidden_units_and_gated_ones() -> None:
    net, x = mlp(seed=0).double(), torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)
    laws = symmetries(net, x)
    assert [law.kind for law in laws.laws.values()] == ["scale", "scale"]
    drawn = laws.random(0)
    other = laws.apply(net, drawn)
    assert torch.allclose(other.tensor("0.bias"), net[0].bias.detach() * drawn["layer.0"])
    assert torch.allclose(
        other.tensor("2.weight") * drawn["layer.0"], drawn["layer.2"][:, None] * net[2].weight
    )
    found = weft.align(other, to=net, how="rotations", module=net, example_inputs=x)
    for n, t in net.state_dict().items():
        assert torch.allclose(found.tensor(n), t, atol=1e-4)
    smooth = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2))
    assert not symmetries(smooth, torch.randn(3, 4)).laws
    plain = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    assert [law.kind for law in symmetries(plain, torch.randn(3, 4)).laws.values()] == ["linear"]


def test_symmetries_are_saved_streamed_and_checked(tmp_path: Path) -> None:
    net, _, laws = made("llama")
    laws.save(tmp_path / "laws.json")
    again = Symmetries.load(tmp_path / "laws.json")
    assert again == laws and "orthogonal of 16" in str(laws) and "planes" in str(laws)
    drawn = laws.random(3)
    lazy = again.apply(net, drawn)
    weft.save(lazy, tmp_path / "turned")
    saved = weft.load(tmp_path / "turned")
    assert all(torch.equal(saved.tensor(n), lazy.tensor(n)) for n in lazy)
    part = lazy.tensors["model.norm.weight"].numel
    assert len(lazy.read("model.norm.weight", 0, part)) == part

    stream = "model.embed_tokens"
    with pytest.raises(Problems) as told:
        laws.apply(
            net,
            {
                stream: 2 * laws.laws[stream].eye(),
                "nowhere": torch.eye(2),
                "model.norm.weight": torch.ones(2),
            },
        )
    assert all(w in str(told.value) for w in ("is not orthogonal", "no such law", "shape [16] is needed"))
    dead = {n: t.clone() for n, t in net.state_dict().items()}
    dead["model.norm.weight"][3] = 0
    with pytest.raises(DataError, match="cannot be folded"):
        laws.folded(dead)
    with pytest.raises(DataProblems, match="does not fit these symmetries"):
        laws.apply({n: t[:-1] for n, t in dead.items()}, drawn)
    with pytest.raises(DataProblems, match="not in"):
        laws.apply({"model.norm.weight": torch.ones(16)}, drawn)
    with pytest.raises(DataError, match="on meta"), torch.device("meta"):
        symmetries(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    (tmp_path / "bad.json").write_text('{"laws": {"a": {"kind": "scale"}}}')
    with pytest.raises(DataError, match="holds no symmetries"):
        Symmetries.load(tmp_path / "bad.json")


def test_what_cannot_be_turned_is_told() -> None:
    a, b = mlp(seed=0), mlp((6, 9, 8, 3), seed=1)
    with pytest.raises(DataProblems, match="shapes differ"):
        weft.align(b, to=a, how="rotations", module=a, example_inputs=torch.randn(3, 6))
    with pytest.raises(UsageError, match="give module="):
        weft.align(dict(a.state_dict()), to=dict(a.state_dict()), how="rotations", spec=discover(a))
    broken = {n: t.clone() for n, t in a.state_dict().items()}
    broken["2.weight"][0, 0] = torch.nan
    with pytest.raises(DataError, match="NaN or infinite"):
        weft.align(broken, to=a, how="rotations", module=a, example_inputs=torch.randn(3, 6))
    with pytest.raises(UsageError, match="rounds and sweeps"):
        weft.align(a, to=a, how="rotations", rounds=0)
