"""`weft.evaluate` against figures made by hand, for plain, routed and calibrated models; wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.calibrate import Adapted
from weft.errors import DataError, Problems, UsageError
from weft.routing import Gating

TASKS = ("a", "b", "c")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def data(n: int = 300) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return {
        t: (torch.randn(n, 4, generator=g) + 4 * i, torch.randint(3, (n,), generator=g))
        for i, t in enumerate(TASKS)
    }


def routed(gate: str | Gating = "prototype", **more: Any) -> weft.routing.Routed:
    inputs = {t: x for t, (x, _) in data().items()} if gate == "prototype" else None
    experts = {t: net(i + 1) for i, t in enumerate(TASKS)}
    return weft.route(net(), net(), experts, gate=gate, data=inputs, **more)


def test_a_plain_model_has_the_scores_that_its_outputs_have(tmp_path: Path) -> None:
    weft.save(net(3), tmp_path / "m.safetensors")
    found = weft.evaluate(str(tmp_path / "m.safetensors"), data(), module=net())
    for row, (x, y) in zip(found.tasks, data().values(), strict=True):
        out = net(3)(x)
        assert row.accuracy == pytest.approx(float((out.argmax(1) == y).double().mean()))
        assert row.loss == pytest.approx(F.cross_entropy(out, y).item(), rel=1e-5)
        assert row.sent is None and row.perplexity is None and row.examples == row.targets == 300
    assert [r.task for r in found.tasks] == list(TASKS) and found.cost is None and not found.told
    assert found.parameters == 4 * 6 + 6 + 6 * 3 + 3 and found.bytes == 4 * found.parameters
    assert found.mean == pytest.approx(sum(r.score for r in found.tasks) / 3)
    assert found.worst.score == min(r.score for r in found.tasks)
    # batches, of any size, and mappings give the same
    x, y = data()["a"]
    for given in ([(x[:7], y[:7]), (x[7:], y[7:])], {"input": x, "labels": y}):
        again = weft.evaluate(net(3), given).tasks[0]
        assert again.task == "data" and again.accuracy == found.tasks[0].accuracy
        assert again.loss == pytest.approx(found.tasks[0].loss, rel=1e-5)
    few = weft.evaluate(net(3), data(), samples=50).tasks[1]
    x, y = (v[:50] for v in data()["b"])
    assert few.examples == 50 and few.loss == pytest.approx(F.cross_entropy(net(3)(x), y).item(), rel=1e-5)


def test_a_model_is_left_as_it_was() -> None:
    model = net().train()
    weft.evaluate(model, data())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_shares_are_those_of_the_weights_that_examples_took() -> None:
    model = routed(rest=0.3)
    found = weft.evaluate(model, data())
    for row, (x, y) in zip(found.tasks, data().values(), strict=True):
        w = model.weights_for(x)
        assert isinstance(w, Tensor) and row.sent is not None and row.weights is not None
        ahead = (w == w.max(1, keepdim=True).values).sum(1) == 1  # features that are all zero are like none
        went = (F.one_hot(w.argmax(1), 3) * ahead[:, None]).double().mean(0)
        assert list(row.sent.values()) == pytest.approx(went.tolist())
        assert list(row.weights.values()) == pytest.approx(w.double().mean(0).tolist(), rel=1e-5)
        assert row.accuracy == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert found.tasks[1].sent["b"] > 0 and found.cost == model.cost()  # type: ignore[index]
    assert found.cost is not None and found.parameters == 3 * found.cost.dense + found.cost.dense + 3 * 6
    assert "a" in found.to_json()["tasks"][0]["sent"]


def test_inputs_that_no_expert_gets_are_sent_to_none() -> None:
    unsure = routed(Gating.of("energy", scope="layer", per="sample", top=None, unsure=0.999), where="linear")
    row = weft.evaluate(unsure, data()).tasks[0]
    assert row.sent == dict.fromkeys(TASKS, 0.0) and row.weights == dict.fromkeys(TASKS, 0.0)


def test_by_token_only_tokens_that_count_are_counted() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.map = nn.Embedding(11, 8), nn.Linear(8, 11)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.map(self.table(input_ids))
            return out

    def made(seed: int) -> Reads:
        torch.manual_seed(seed)
        return Reads()

    model = weft.route(made(0), made(0), {"a": made(1), "b": made(2)}, gate="energy", where=["map"])
    ids = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    row = weft.evaluate(model, {"texts": [batch]}, loss="next_token").tasks[0]
    w = model.weights_for(input_ids=ids, attention_mask=mask)
    assert isinstance(w, dict)
    kept = w["map"][mask != 0]
    assert len(kept) == 7 and row.sent is not None
    assert list(row.sent.values()) == pytest.approx(F.one_hot(kept.argmax(1), 2).double().mean(0).tolist())
    # 4 + 1 tokens have one before them; what is padded is neither predicted nor counted
    logp = model(input_ids=ids, attention_mask=mask).log_softmax(-1)
    each = [-logp[0, t, ids[0, t + 1]] for t in range(4)] + [-logp[1, 0, ids[1, 1]]]
    assert row.targets == 5 and row.loss == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    assert row.perplexity == pytest.approx(torch.tensor(row.loss).exp().item(), rel=1e-5)


def test_the_task_is_told_where_it_has_to_be(tmp_path: Path) -> None:
    model = routed("oracle")
    found = weft.evaluate(model, data())
    assert found.told
    for i, (row, (x, y)) in enumerate(zip(found.tasks, data().values(), strict=True)):
        assert row.accuracy == pytest.approx(float((net(i + 1)(x).argmax(1) == y).double().mean()))
        assert row.sent == {t: float(t == row.task) for t in TASKS}
    model.save(tmp_path / "routed")
    again = weft.evaluate(tmp_path / "routed", data(), module=net())
    assert [r.accuracy for r in again.tasks] == [r.accuracy for r in found.tasks]
    head = {"a": {"2.bias": torch.tensor([9.0, 0, 0])}, "b": {"2.bias": torch.tensor([0, 9.0, 0])}}
    own = weft.evaluate(Adapted(net(), {}, head), {t: data()[t] for t in ("a", "b")})
    assert own.told and own.tasks[0].accuracy == pytest.approx(float((data()["a"][1] == 0).double().mean()))
    with pytest.raises(Problems, match=r"knows a, b, c(.|\n)*'x': no such task"):
        weft.evaluate(model, {"x": data()["a"]})


def test_a_preference_is_given_to_models_that_want_one() -> None:
    model = routed("preference", where=["0", "2"])
    with pytest.raises(UsageError, match="give one, a share of each of a, b, c"):
        weft.evaluate(model, data())
    weft.routing.train(model, "cross_entropy", data(), steps=1, balance="ls")
    rows = weft.evaluate(model, data(), preference=[1, 0, 0]).tasks
    x, y = data()["a"]
    right = (model(x, preference=[1.0, 0, 0]).argmax(1) == y).double().mean()
    assert rows[0].accuracy == pytest.approx(float(right))
    with pytest.raises(UsageError, match="weighed by one; this one is not"):
        weft.evaluate(net(), data(), preference=[1, 0])


def test_losses_and_own_functions() -> None:
    x = torch.randn(20, 4)
    y = net()(x) + 0.5
    assert weft.evaluate(net(), (x, y.detach()), loss="mse").mean == pytest.approx(0.25, rel=1e-4)
    found = weft.evaluate(net(), (x, y.detach()), loss=lambda out, y: (out - y).abs().max())
    assert found.metric == "loss" and found.worst.score == pytest.approx(0.5, rel=1e-4)
    masked = torch.full((20,), -100)
    masked[3] = 1
    assert weft.evaluate(net(), (x, masked)).tasks[0].targets == 1


def test_wrong_input_is_told_in_one_sentence(tmp_path: Path) -> None:
    x, y = data()["a"]
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan  # type: ignore[index]
    routed("oracle").save(tmp_path / "routed")
    cases: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
        (UsageError, "task 'a': there are no labels", net(), {"a": x}, {}),
        (DataError, "a label is 3, but the outputs have classes 0 to 2", net(), (x, y + 1), {}),
        (DataError, "do not fit outputs", net(), (x, y[:, None]), {}),
        (DataError, "labels of classes are whole numbers", net(), (x, y.float()), {}),
        (DataError, "no label that counts", net(), (x, torch.full_like(y, -100)), {}),
        (DataError, "NaN or infinite", broken, (x, y), {}),
        (DataError, "the inputs have NaN", net(), (x * torch.nan, y), {}),
        (UsageError, "different lengths", net(), (x, y[:5]), {}),
        (UsageError, "did you mean 'cross_entropy'", net(), (x, y), {"loss": "crossentropy"}),
        (DataError, "one a token", net(), (x, y), {"loss": "next_token"}),
        (UsageError, "at least 1", net(), (x, y), {"samples": 0}),
        (UsageError, "name no task", net(), {}, {}),
        (DataError, "hold no batches", net(), [], {}),
        (UsageError, "must have an end", net(), lambda g: (x, y), {}),
        (UsageError, "is a routed model, whose network's code is yours", tmp_path / "routed", (x, y), {}),
    ]  # fmt: skip
    for kind, match, model, given, more in cases:
        with pytest.raises(kind, match=match):
            weft.evaluate(model, given, **more)
