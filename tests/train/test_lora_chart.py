"""LoRA as a chart: equal to peft's, orthogonal starts, written and read as an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from charted_nets import Convolved, Data, moved, perceptron
from torch import Tensor, nn

import weft
from weft.errors import DataProblems, UsageError
from weft.train import Charted, LowRank, chosen


def test_it_is_lora_as_peft_computes_it_and_peft_reads_it_back(tmp_path: Path, blobs: Data) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    net = transformers.GPT2LMHeadModel(config).eval()
    names = [n for n in chosen(net, "linear") if "lm_head" not in n]
    chart = LowRank(net, names, rank=3, alpha=12)
    model = moved(Charted(net, chart), 0.3).eval()
    weft.save(chart.adapter(model.phi), tmp_path / "adapter")
    ids = torch.arange(12).reshape(2, 6)
    theirs = peft.PeftModel.from_pretrained(net, str(tmp_path / "adapter")).eval()
    assert torch.allclose(theirs(input_ids=ids).logits, model(input_ids=ids), atol=1e-5)
    assert not torch.allclose(model(input_ids=ids), model.inner(input_ids=ids).logits, atol=1e-2)


def test_finetune_gives_an_adapter_whose_sum_with_the_base_is_the_checkpoint(
    tmp_path: Path, blobs: Data
) -> None:
    net = Convolved()
    x = torch.randn(24, 2, 6, 6)
    made = weft.finetune(net, (x, torch.arange(24) % 3), mode="lora", which=["body.0.weight", "body.8.weight"],
                         lora={"rank": 2, "alpha": 4}, steps=6, lr=1e-2)  # fmt: skip
    weft.save(net, tmp_path / "base")
    weft.save(made.adapter, tmp_path / "adapter")
    both = weft.load(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}").state_dict()
    whole = made.checkpoint.state_dict()
    for name in ("body.0.weight", "body.8.weight"):
        assert torch.allclose(both[name], whole[name], atol=1e-6)
        assert not torch.equal(whole[name], net.state_dict()[name])
    assert set(made.checkpoint) == set(net.state_dict())


def test_the_start_leaves_the_network_as_it_is_and_is_shared_by_name_and_seed() -> None:
    net = perceptron()
    names = chosen(net, "linear")
    one, two = LowRank(net, names, rank=4), LowRank(perceptron(5), names[::-1], rank=4)
    assert all(torch.equal(t, dict(net.named_parameters())[n]) for n, t in one(one.start).items())
    assert all(torch.equal(one.start[f"{n}:A"], two.start[f"{n}:A"]) for n in names)
    other = LowRank(net, names, rank=4, seed=1)
    assert not torch.equal(one.start["0.weight:A"], other.start["0.weight:A"])


def test_subspaces_of_tasks_are_orthogonal_and_of_the_usual_size() -> None:
    net = perceptron()
    charts = [LowRank(net, ["2.weight"], rank=5, subspace=(i, 4), train_a=False) for i in range(4)]
    starts = torch.cat([c.factors("2.weight", c.start)[1] for c in charts])
    assert torch.allclose(starts @ starts.T, torch.eye(20) / 3, atol=1e-6)
    updates = []
    for i, chart in enumerate(charts):
        model = moved(Charted(net, chart), 1.0, seed=i)
        updates.append(model.delta()["2.weight"].detach())
    assert (
        float((updates[0] @ updates[3].T).abs().max()) < 1e-5 < float((updates[0] @ updates[0].T).abs().max())
    )


def test_a_start_away_from_other_tasks_does_not_see_their_inputs() -> None:
    net = perceptron()
    basis = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0))).Q
    inputs = torch.randn(100, 18, generator=torch.Generator().manual_seed(1)) @ basis[:18]
    gram = inputs.T @ inputs / 100
    chart = LowRank(net, ["2.weight"], rank=6, away={"2.weight": gram}, train_a=False)
    a = chart.factors("2.weight", chart.start)[1]
    assert float((a @ inputs.T).abs().max()) < 1e-4
    drawn = LowRank(net, ["2.weight"], rank=6).start["2.weight:A"]
    assert float((drawn @ inputs.T).abs().max()) > 0.5
    stored = weft.load({"gram/2.weight": gram})
    again = LowRank(net, ["2.weight"], rank=6, away=stored, train_a=False)
    assert torch.equal(again.factors("2.weight", again.start)[1], a)


@pytest.mark.parametrize("train_a", [True, False])
def test_the_chart_has_an_inverse(train_a: bool) -> None:
    net = Convolved().double()
    chart = LowRank(net, ["body.0.weight", "body.8.weight"], rank=3, alpha=7, train_a=train_a)
    model = moved(Charted(net, chart), 0.4)
    theta = chart(model.phi)
    back = chart(chart.of(theta))
    for name in theta:
        assert torch.allclose(back[name], theta[name], atol=1e-10)


def test_wrong_requests_are_refused() -> None:
    net = perceptron()
    for settings, message in (
        ({"rank": 0}, "rank must be 1"),
        ({"rank": 4, "subspace": (2, 2)}, "counts from 0"),
        ({"rank": 4, "subspace": (0, 2), "away": {}}, "both choose"),
        ({"rank": 4, "away": {}}, "no Gram matrix of the inputs of 2.weight"),
        ({"rank": 4, "away": {"2.weight": torch.eye(3)}}, r"\[3, 3\], not \[24, 24\]"),
        ({"rank": 4, "away": {"2.weight": torch.eye(24) / 0}}, "not finite"),
    ):
        with pytest.raises(UsageError, match=message):
            LowRank(net, ["2.weight"], **settings)
    with pytest.raises(DataProblems, match="24 inputs, where 28 are needed"):
        LowRank(net, ["2.weight"], rank=7, subspace=(0, 4))
    with pytest.raises(DataProblems, match=r"0\.bias: no matrix"):
        LowRank(net, ["0.bias"])
    fused = nn.MultiheadAttention(4, 2)
    chart = LowRank(fused, ["in_proj_weight"], rank=2)
    with pytest.raises(UsageError, match="not of in_proj_weight: save the whole weights"):
        chart.adapter(chart.start)


def rank_of(delta: Tensor) -> int:
    return int(torch.linalg.matrix_rank(delta.double(), rtol=1e-6))


def test_trained_updates_have_the_rank(blobs: Data) -> None:
    made = weft.finetune(
        perceptron(), blobs, mode="lora", which="2.weight", lora={"rank": 3}, steps=10, lr=1e-2
    )
    assert rank_of(made.model.delta()["2.weight"].detach()) == 3
