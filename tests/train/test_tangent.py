"""Linearised modules: the first-order expansion, by torch's forward mode and in closed form, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from charted_nets import Attentive, Convolved, moved, perceptron
from torch import Tensor, nn
from torch.func import functional_call

import weft
from weft.analysis.disentanglement import disentanglement, total_variation
from weft.analysis.network import Network
from weft.errors import DataError, UsageError
from weft.train import Charted, Linearised, LowRank, chosen, load_linearised

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (4, 6)),
    "transformer": (Attentive, (4, 5, 5)),
    "post-norm transformer with ReLU": (lambda: Attentive(False, "relu"), (4, 5, 5)),
}
CONVOLVED = {"convolutions": (Convolved, (4, 2, 6, 6))}


def example(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = (NETWORKS | CONVOLVED)[name]
    return make().double(), torch.randn(
        shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


@pytest.mark.parametrize("name", [*NETWORKS, *CONVOLVED])
def test_at_its_start_it_is_the_network_and_it_moves_along_the_derivative(name: str) -> None:
    net, x = example(name)
    net.eval()
    lin = Linearised(net)
    assert torch.allclose(lin(x), net(x), atol=1e-12)

    moved(lin, 1.0)
    theta0 = {n: p.detach() for n, p in net.named_parameters()}
    step = {n: d.detach() for n, d in lin.delta().items()}
    h = 1e-6
    ahead, behind = (
        functional_call(net, {n: theta0[n] + s * h * step[n] for n in step}, (x,)) for s in (1, -1)
    )
    finite = (ahead - behind) / (2 * h)
    assert torch.allclose(lin(x) - net(x), finite, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["jvp", "closed"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_it_is_linear_in_the_step(name: str, engine: Any) -> None:
    net, x = example(name)
    a, b, both = (Linearised(net, engine=engine) for _ in range(3))
    moved(a, 0.3, 1), moved(b, 0.3, 2)
    with torch.no_grad():
        for n, p in both.phi.items():
            start = both.chart.start[n]
            p.copy_(start + 0.7 * (a.phi[n] - start) - 1.9 * (b.phi[n] - start))
    f0 = net.eval()(x)
    assert torch.allclose(both(x) - f0, 0.7 * (a(x) - f0) - 1.9 * (b(x) - f0), atol=1e-10)


@pytest.mark.parametrize("which", ["all", "attention", "blocks.layers.1.*", "head.bias"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_closed_form_is_the_product_and_so_is_its_gradient(which: str, norm_first: bool) -> None:
    net = Attentive(norm_first).double()
    x = torch.randn(4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(4, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    jvp, closed = Linearised(net, which=which), Linearised(net, which=which, engine="closed")
    outputs = [moved(m, 0.2)(x, hidden) for m in (jvp, closed)]
    assert torch.allclose(*outputs, atol=1e-12)
    slopes = [
        torch.autograd.grad(o.square().sum(), list(m.parameters()))
        for o, m in zip(outputs, (jvp, closed), strict=True)
    ]
    assert len(slopes[0]) == len(chosen(net, which))
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def test_layers_before_the_first_trained_one_carry_no_pairs() -> None:
    net = Attentive().eval()
    seen: dict[str, str] = {}
    for name in ("embed", "blocks.layers.0", "head"):
        net.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: seen.__setitem__(name, type(out).__name__)
        )
    moved(Linearised(net, which="blocks.layers.1.*", engine="closed"), 0.1)(torch.randn(2, 5, 5))
    assert seen == {"embed": "Tensor", "blocks.layers.0": "Tensor", "head": "Pair"}


@pytest.mark.parametrize("engine", ["jvp", "closed"])
def test_models_of_transformers(engine: Any) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    tiny = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    gpt2 = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    models = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny, num_key_value_heads=2)),
        transformers.GPT2LMHeadModel(gpt2),
        transformers.BertForSequenceClassification(transformers.BertConfig(**tiny)),
    )
    for net in models:
        net = net.double().eval()
        lin = Linearised(net, engine=engine)
        before = net(input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(lin(input_ids=ids, attention_mask=mask), before, atol=1e-7)
        moved(lin, 1.0)
        tangent = lin(input_ids=ids, attention_mask=mask) - before
        h, step = 1e-5, lin.delta()
        theta0 = {n: p.detach() for n, p in net.named_parameters()}
        ahead, behind = (
            functional_call(net, {n: theta0[n] + s * h * step[n] for n in step}, (), {
                "input_ids": ids, "attention_mask": mask,
            }).logits
            for s in (1, -1)
        )  # fmt: skip
        # transformers norms in float32 whatever the model's dtype, so differences are rough
        assert torch.allclose(tangent, (ahead - behind) / (2 * h), rtol=1e-2, atol=2e-2), type(net)


def test_it_stays_in_evaluation_mode_and_leaves_the_network_alone() -> None:
    net = Attentive().train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    lin = moved(Linearised(net), 0.3).train()
    x = torch.randn(4, 5, 5)
    assert torch.equal(lin(x), lin(x)), "no dropout"
    assert net.training and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_linearised_adapter_is_the_linearised_network_moved_by_the_update() -> None:
    net = perceptron().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    adapted = Linearised(net, chart=LowRank(net, chosen(net, "linear"), rank=3, alpha=6.0))
    moved(adapted, 0.5)
    whole = Linearised(net, which="linear")
    whole.take(adapted.chart(adapted.phi))  # θ0 + s B A, B0 = 0 and ΔA without effect
    held = Linearised(net, chart=LowRank(net, chosen(net, "linear"), rank=3, alpha=6.0, train_a=False))
    with torch.no_grad():
        for n, p in held.phi.items():
            p.copy_(adapted.phi[n])
    assert torch.allclose(adapted(x), held(x), atol=1e-12), "the derivative in A vanishes at B0 = 0"
    theta = held.chart(held.phi)
    whole.take(theta)
    assert torch.allclose(held(x), whole(x), atol=1e-12)


def test_its_state_is_an_ordinary_checkpoint_that_loads_again(tmp_path: Path) -> None:
    net = perceptron()
    made = weft.finetune(net, lambda g: (torch.randn(8, 6, generator=g), torch.arange(8) % 3), mode="tangent",
                         steps=5, lr=1e-2)  # fmt: skip
    x = torch.randn(4, 6)
    weft.save(made.checkpoint, tmp_path / "out")
    again = weft.load(tmp_path / "out")
    assert list(again) == list(net.state_dict())
    lin = load_linearised(tmp_path / "out", net)
    assert torch.equal(lin(x), made.model(x)) and not torch.equal(lin(x), net(x))
    assert torch.equal(load_linearised(tmp_path / "out", perceptron(7), base=net)(x), lin(x))
    assert load_linearised(tmp_path / "out", net, engine="closed")(x).allclose(lin(x), atol=1e-5)
    # a merge over θ0 carries no note; a merge of tangent weights carries that of its first model
    third = load_linearised(weft.load(net) + (again - weft.load(net)) / 3, net)
    assert torch.allclose(third(x) - net(x), (lin(x) - net(x)) / 3, atol=1e-6)
    assert torch.equal(load_linearised(weft.merge([again, again]), net)(x), lin(x))

    with pytest.raises(DataError, match="around another θ0"):
        load_linearised(tmp_path / "out", perceptron(7))
    part = weft.finetune(net, lambda g: (torch.randn(8, 6, generator=g), torch.arange(8) % 3), mode="tangent",
                         which="0.*", steps=2)  # fmt: skip
    assert load_linearised(part.checkpoint, net).chart.names == ["0.weight", "0.bias"]
    with pytest.raises(DataError, match=r"4\.weight.* differ from θ0 but are not among"):
        load_linearised(made.checkpoint, net, which="0.*")


def test_state_dicts_go_in_and_out_as_the_networks_own() -> None:
    net = Convolved()
    outer = nn.ModuleDict({"lin": moved(Charted(net), 0.1)}).eval()
    state = outer.state_dict()
    assert set(state) == {f"lin.{n}" for n in net.state_dict()}
    fresh = nn.ModuleDict({"lin": Charted(net)}).eval()
    assert not torch.equal(fresh["lin"](torch.ones(1, 2, 6, 6)), outer["lin"](torch.ones(1, 2, 6, 6)))
    fresh.load_state_dict(state)
    x = torch.randn(2, 2, 6, 6)
    assert torch.equal(fresh["lin"](x), outer["lin"](x))
    state.pop("lin.body.0.weight")
    with pytest.raises(RuntimeError, match=r"lin\.body\.0\.weight"):
        fresh.load_state_dict(state)


def test_tied_weights_move_together() -> None:
    transformers = pytest.importorskip("transformers")
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    ))  # fmt: skip
    state = moved(Charted(net, which="transformer.wte.weight"), 0.1).weights()
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
    assert not torch.equal(state["lm_head.weight"], net.lm_head.weight)


def test_half_precision_networks_train_in_float32_and_store_half() -> None:
    net = perceptron().bfloat16()
    model = Charted(net)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    assert {t.dtype for t in model.weights().values()} == {torch.bfloat16}


class Odd(nn.Module):
    """An operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumprod(x * self.w, -1)


def test_what_cannot_be_linearised_says_so() -> None:
    with pytest.raises(UsageError, match="no closed form for cumprod"):
        Linearised(Odd(), engine="closed")(torch.ones(2, 3))
    with pytest.raises(UsageError, match="no engine 'sideways'"):
        Linearised(Odd(), engine="sideways")  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r"no parameter of Sequential is called so:\n  - '0.wieght'.*0.weight"
    ):
        Linearised(perceptron(), which="0.wieght")
    with pytest.raises(UsageError, match="no attention: choose which='linear'"):
        Linearised(perceptron(), which="attention")
    with pytest.raises(UsageError, match="returns a list without logits"):
        Linearised(nn.Sequential(nn.Linear(2, 2), _Listed()))(torch.ones(1, 2))


class _Listed(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def test_values_of_a_checkpoint_and_analyses_reach_a_linearised_model() -> None:
    """Its state dict is made when it is asked for: copying into what it gives would change nothing."""
    net, ends = perceptron(), [perceptron(1), perceptron(2)]
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    lin = weft.materialize(ends[0], Linearised(net))
    expected = load_linearised(ends[0], net)
    assert torch.allclose(lin(x), expected(x), atol=1e-6) and not torch.allclose(lin(x), net(x), atol=1e-2)

    there = Network(Linearised(net), (x, torch.zeros(40, dtype=torch.int64)))
    found = disentanglement([there, there], net, ends, alphas=[0.5], distance="total_variation")
    half = [load_linearised(weft.merge([e], "task_arithmetic", base=net, scale=0.5), net)(x) for e in ends]
    both = load_linearised(weft.merge(ends, "task_arithmetic", base=net, scale=0.5), net)(x)
    expected_error = sum(total_variation(h, both) for h in half)
    assert found.error[0][0] == pytest.approx(expected_error, abs=1e-5) and expected_error > 0.01
