"""The loop: what each mode moves, determinism, hooks, rounds, data of every kind, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from charted_nets import Attentive, Convolved, Data, perceptron
from torch import Tensor
from torch.nn import functional as F

import weft
from weft.errors import DataError, UsageError
from weft.train import Charted, Direct, Shared, Training
from weft.train.hooks import State


def accuracy(model: torch.nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(-1) == data[1]).double().mean())


def same(a: weft.Checkpoint, b: weft.Checkpoint) -> bool:
    return all(torch.equal(a.tensor(n), b.tensor(n)) for n in a)


@pytest.mark.parametrize("mode", ["full", "lora", "tangent", "tangent_lora"])
def test_every_mode_learns_and_leaves_the_module_alone(mode: str, blobs: Data) -> None:
    net = perceptron()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    made = weft.finetune(net, blobs, mode=mode, epochs=12, lr=1e-2, seed=3)
    assert accuracy(made.model, blobs) > accuracy(net, blobs) + 0.2
    assert sum(made.losses[-8:]) < 0.8 * sum(made.losses[:8])
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()) and net.training
    again = weft.finetune(net, blobs, mode=mode, epochs=12, lr=1e-2, seed=3)
    assert same(made.checkpoint, again.checkpoint), "the same bytes for a seed"
    other = weft.finetune(net, blobs, mode=mode, epochs=12, lr=1e-2, seed=4)
    assert not same(made.checkpoint, other.checkpoint)


def test_plain_training_is_torchs_own(blobs: Data) -> None:
    """Against a loop written here."""
    net = perceptron()
    made = weft.finetune(net, blobs, epochs=2, batch=50, lr=3e-3, weight_decay=0.1, seed=5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    steps, step = 10, 0
    for _ in range(2):
        for batch in torch.randperm(240, generator=generator).split(50):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            optimizer.zero_grad()
            F.cross_entropy(net(blobs[0][batch]), blobs[1][batch]).backward()
            optimizer.step()
            step += 1
    for name, value in net.state_dict().items():
        assert torch.allclose(made.checkpoint.tensor(name), value, atol=1e-6)


def test_linear_layers_moves_the_weights_of_attention_alone() -> None:
    net = Attentive()
    x, y = torch.randn(32, 4, 5), torch.arange(32) % 3
    made = weft.finetune(net, (x, y), mode="linear_layers", steps=4, lr=1e-2)
    changed = {n for n, t in net.state_dict().items() if not torch.equal(made.checkpoint.tensor(n), t)}
    expected = {
        f"blocks.layers.{i}.self_attn.{w}" for i in range(2) for w in ("in_proj_weight", "out_proj.weight")
    }
    assert changed == expected


def test_frozen_parameters_and_chosen_ones(blobs: Data) -> None:
    net = perceptron()
    made = weft.finetune(net, blobs, which=["0.*", "2.*"], freeze=["*.bias"], steps=3)
    changed = {n for n, t in net.state_dict().items() if not torch.equal(made.checkpoint.tensor(n), t)}
    assert changed == {"0.weight", "2.weight"}


def test_batch_statistics_are_learned_in_plain_modes_and_kept_in_tangent_ones() -> None:
    net, data = Convolved(), (torch.randn(32, 2, 6, 6) + 1, torch.arange(32) % 3)
    plain = weft.finetune(net, data, steps=4).checkpoint.state_dict()
    tangent = weft.finetune(net, data, mode="tangent", steps=4).checkpoint.state_dict()
    name = "body.1.running_mean"
    assert not torch.equal(plain[name], net.state_dict()[name])
    assert torch.equal(tangent[name], net.state_dict()[name])


def test_dropout_is_drawn_from_the_runs_own_stream() -> None:
    net, data = Attentive(), (torch.randn(32, 4, 5), torch.arange(32) % 3)
    torch.manual_seed(1)
    one = weft.finetune(net, data, steps=3, seed=0)
    after = torch.rand(1)
    torch.manual_seed(2)
    two = weft.finetune(net, data, steps=3, seed=0)
    assert same(one.checkpoint, two.checkpoint)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after), "the caller's stream goes on undisturbed"


# -- hooks ----------------------------------------------------------------------------------------------


def test_hooks_see_the_run_in_order_and_snapshots_are_deep(blobs: Data) -> None:
    seen: list[tuple[str, int]] = []
    kept: list[dict[str, Tensor]] = []
    weft.finetune(
        perceptron(), blobs, steps=7, lr=1e-2,
        on_gradient=lambda s: seen.append(("gradient", s.step)), on_step=lambda s: seen.append(("step", s.step)),
        on_checkpoint=[lambda s: seen.append(("checkpoint", s.step)), lambda s: kept.append(s.weights())],
        checkpoint_every=3,
    )  # fmt: skip
    assert [s for s in seen if s[0] == "checkpoint"] == [("checkpoint", i) for i in (3, 6, 7)]
    assert seen[:2] == [("gradient", 1), ("step", 1)]
    assert len(kept) == 3 and not torch.equal(kept[0]["0.weight"], kept[1]["0.weight"])


def test_a_running_mean_is_a_hook(blobs: Data) -> None:
    """Stochastic weight averaging in four lines."""
    mean: dict[str, Tensor] = {}

    def average(state: State) -> None:
        if state.step <= 4:
            return
        for name, value in state.weights().items():
            before = mean.get(name, torch.zeros_like(value))
            mean[name] = before + (value - before) / (state.step - 4)

    trace: list[Tensor] = []
    weft.finetune(perceptron(), blobs, steps=9, lr=1e-2,
                  on_step=[average, lambda s: trace.append(s.weights()["0.weight"])])  # fmt: skip
    assert torch.allclose(mean["0.weight"], torch.stack(trace[4:]).mean(0), atol=1e-6)


def test_a_gradient_hook_masks_and_a_step_hook_stops(blobs: Data) -> None:
    def mask(state: State) -> None:
        state.parameters["0.weight"].grad.zero_()  # type: ignore[union-attr]

    def stop(state: State) -> None:
        state.stop = state.step == 4

    net = perceptron()
    made = weft.finetune(net, blobs, steps=50, on_gradient=mask, on_step=stop)
    assert len(made.losses) == 4
    assert torch.equal(made.checkpoint.tensor("0.weight"), net.state_dict()["0.weight"])
    assert not torch.equal(made.checkpoint.tensor("0.bias"), net.state_dict()["0.bias"])


def test_a_round_may_return_weights_to_go_on_from(blobs: Data) -> None:
    net, at = perceptron(), []

    def back_to_start(state: State) -> weft.Checkpoint:
        at.append(state.step)
        return weft.load(net)

    made = weft.finetune(net, blobs, steps=6, lr=1e-2, on_round=back_to_start, round_every=3)
    assert at == [3, 6] and same(made.checkpoint, weft.load(net))


def test_runs_that_take_turns_can_be_merged_and_go_on(blobs: Data) -> None:
    net = Attentive()
    x, y = torch.randn(48, 4, 5), torch.arange(48) % 3
    halves = [(x[:24], y[:24]), (x[24:], y[24:])]

    def train(count: int) -> list[Training]:
        runs = [Training(Charted(net), h, steps=6, seed=i) for i, h in enumerate(halves)]
        while not runs[0].done:
            for run in runs:
                run.advance(count)
        return runs

    alone, turns = train(6), train(2)
    for one, other in zip(alone, turns, strict=True):
        assert same(weft.load(one.model.weights()), weft.load(other.model.weights())), "turns change nothing"
    mean = weft.merge([run.model.weights() for run in turns])
    for run in turns:
        run.replace(mean, optimizer="reset")
    assert same(weft.load(turns[0].model.weights()), weft.load(turns[1].model.weights()))
    assert not turns[0].optimizer.state


def test_a_shared_mean_is_trained_through_its_new_member() -> None:
    net = perceptron().double()
    names = [n for n, _ in net.named_parameters()]
    others = [{n: torch.randn_like(p) for n, p in net.named_parameters()} for _ in range(2)]
    chart = Shared(net, names, others)
    phi = {n: t + 0.3 for n, t in chart.start.items()}
    theta = chart(phi)
    for n, p in net.named_parameters():
        assert torch.allclose(theta[n], p + (others[0][n] + others[1][n] + 0.3) / 3)
        assert torch.allclose(chart.of(theta)[n], phi[n])


# -- data -----------------------------------------------------------------------------------------------


def test_data_of_every_kind_give_the_same_steps(blobs: Data) -> None:
    x, y = blobs
    batches = [(x[i : i + 60], y[i : i + 60]) for i in range(0, 240, 60)]
    listed = weft.finetune(perceptron(), batches, epochs=2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=60)
    assert same(weft.finetune(perceptron(), loader, epochs=2).checkpoint, listed.checkpoint)
    stream = iter([*batches, *batches])
    drawn = weft.finetune(perceptron(), lambda g: next(stream), steps=8)
    assert same(drawn.checkpoint, listed.checkpoint)
    assert len(listed.losses) == 8


def test_mappings_with_labels_go_to_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config).eval()
    ids = (torch.arange(64)[:, None] + torch.arange(8)) % 12  # each token follows from the one before
    made = weft.finetune(net, {"input_ids": ids, "labels": ids}, loss="causal_lm", epochs=60, lr=1e-2)
    assert made.losses[-1] < 0.1 * made.losses[0]
    assert made.checkpoint.config is not None and made.checkpoint.config["model_type"] == "gpt2"
    expected = net(input_ids=ids, labels=ids).loss
    from weft.train.objectives import causal_lm

    assert torch.allclose(causal_lm(net(input_ids=ids).logits, ids), expected, atol=1e-5)


def once() -> Iterator[Data]:
    yield torch.randn(4, 6), torch.arange(4) % 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fulll"}, r"no mode 'fulll'; did you mean 'full'\?"),
        ({"loss": "cross_entropie"}, "did you mean 'cross_entropy'"),
        ({"optimizer": "adamx"}, "did you mean 'adam"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"steps": None}, "steps= or epochs="),
        ({"epochs": 1}, "not both"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"warmup": 9}, "warmup must be 0 to 2"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"lora": {"rank": 2}}, "lora= belongs to"),
        ({"scope": "module"}, "scope='module' belongs to"),
        ({"mode": "tangent_lora", "lora": {"train_a": True}}, "does not depend on A"),
        ({"on_round": print}, "on_round needs round_every"),
        ({"checkpoint_every": 0}, "checkpoint_every must be 1"),
        ({"data": 3}, "not int"),
        ({"data": once(), "steps": 3}, "the data ran out"),
        ({"data": once(), "steps": None, "epochs": 2}, "do not tell how long an epoch is"),
        ({"data": []}, "there are no data"),
        ({"data": [torch.ones(2)]}, "must be \\(inputs, targets\\)"),
        ({"data": [{"x": torch.ones(2)}]}, "needs labels"),
        ({"data": (torch.ones(3, 6), torch.zeros(2, dtype=torch.long))}, "different lengths"),
        ({"loss": "squared"}, "needs one shape"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, object], message: str, blobs: Data) -> None:
    data = settings.pop("data", blobs)
    with pytest.raises(UsageError, match=message):
        weft.finetune(perceptron(), data, **{"steps": 2, **settings})  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_ends_the_run(blobs: Data) -> None:
    x = blobs[0].clone()
    x[5] = float("inf")
    with pytest.raises(DataError, match=r"the objective is nan at step \d+: lower lr"):
        weft.finetune(perceptron(), (x, blobs[1]), epochs=1)


def test_weights_that_do_not_fit_are_refused(blobs: Data) -> None:
    run = Training(Charted(perceptron(), Direct(perceptron(), ["0.weight", "0.bias"])), blobs, steps=1)
    with pytest.raises(DataError, match=r"0\.bias: missing\n  - 0\.weight: shape \[2, 2\]"):
        run.replace({"0.weight": torch.ones(2, 2)})
    with pytest.raises(UsageError, match="only mode='lora'"):
        _ = weft.finetune(perceptron(), blobs, steps=1).adapter
