"""The loop: what it minimises, what it keeps, that it repeats itself, and that nothing goes wrong silently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_nets import Small, family, inputs, labels
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.errors import DataError, DataProblems, Problems, UsageError
from weft.learn import Learned, Mergeable, learn
from weft.learn.losses import Shot, as_loss, entropy

DATA = (inputs(), labels())


def full_batch(merged: Mergeable, loss: str = "cross_entropy", **settings: object) -> Learned:
    return learn(merged, loss, DATA, batch=12, **settings)  # type: ignore[arg-type, no-any-return]


def test_steps_are_those_of_the_optimiser_on_the_dense_formula() -> None:
    """One coefficient a model by SGD, by hand: λ ← λ − lr ∂L/∂λ with momentum."""
    base, models = family(2)
    found = full_batch(Mergeable(Small(), base, models), steps=3, lr=0.2, optimizer="sgd")
    states = [m.state_dict() for m in models]
    c = torch.tensor([0.3, 0.3], dtype=torch.float64, requires_grad=True)
    made, losses = torch.optim.SGD([c], lr=0.2, momentum=0.9), []
    for _ in range(3):
        theta = {
            n: t + sum(ci * (s[n] - t) for ci, s in zip(c, states, strict=True))
            for n, t in base.state_dict().items()
        }
        loss = F.cross_entropy(torch.func.functional_call(Small(), theta, (DATA[0],)), DATA[1])
        made.zero_grad()
        loss.backward()
        made.step()
        losses.append(float(loss.detach()))
    torch.testing.assert_close(found.coefficients["all"], c.detach())
    assert found.losses == pytest.approx(losses)


def test_the_loss_of_several_tasks_is_their_mean() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models, tasks=["a", "b"])
    data = {"a": DATA, "b": (inputs(seed=3), labels(seed=4))}
    found = learn(merged, "cross_entropy", data, steps=1, batch=12, lr=0.0)
    both = [float(F.cross_entropy(merged(x), y).detach()) for x, y in data.values()]
    assert found.losses == pytest.approx([sum(both) / 2])


def test_what_is_saved_is_what_was_trained(tmp_path: Path) -> None:
    base, models = family(2)
    for parts in ("model", "element"):
        found = full_batch(Mergeable(Small(), base, models, parts), steps=5, lr=0.1, split="train")
        weft.save(found.checkpoint(), tmp_path / parts)
        saved = weft.load(tmp_path / parts)
        for name, theta in found.merged.weights().items():
            torch.testing.assert_close(saved.tensor(name), theta.detach(), rtol=1e-12, atol=1e-13)
        filled = weft.materialize(saved, Small())
        torch.testing.assert_close(filled(DATA[0]), found.merged(DATA[0]))
        record = json.loads((tmp_path / parts / "weft-manifest.json").read_text())
        assert "by train data" in record["made_from"]


def test_a_seed_gives_the_same_numbers_and_leaves_the_caller_s_alone() -> None:
    base, models = family(2)

    net = Small()

    def noisy(shot: Shot) -> Tensor:
        return entropy(shot) + 0.1 * (shot.outputs * torch.rand(1, dtype=torch.float64)).square().mean()

    def run(seed: int) -> Learned:
        merged = Mergeable(net, base, models, "tensor")
        return learn(merged, noisy, inputs(), steps=5, batch=4, lr=0.1, seed=seed)

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = run(0), run(0), run(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.losses == same.losses != other.losses
    assert all(torch.equal(t, same.coefficients[n]) for n, t in one.coefficients.items())


def test_the_best_on_validation_data_is_kept_the_start_included() -> None:
    base, models = family(2)
    other = (inputs(seed=1), labels(seed=2))
    found = full_batch(
        Mergeable(Small(), base, models, "element"), steps=60, lr=0.3, validation=other, every=5
    )
    assert list(found.validated) == list(range(0, 61, 5))
    assert found.validated[found.step] == min(found.validated.values()) < found.validated[60]
    made = found.merged(other[0]).detach()
    assert float(F.cross_entropy(made, other[1])) == pytest.approx(found.validated[found.step])
    told = found.to_json()
    assert told["chosen"] == found.step and not told["test_time"] and json.dumps(told)


def test_a_start_that_is_best_is_kept() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models)

    def worse(shot: Shot) -> Tensor:
        return -F.cross_entropy(shot.outputs, shot.labels) if torch.is_grad_enabled() else as_loss(
            "cross_entropy")(shot)  # fmt: skip

    found = learn(merged, worse, DATA, batch=12, steps=5, lr=0.1, validation=DATA, every=1)
    assert found.step == 0 and found.coefficients["all"].tolist() == [0.3, 0.3]


def test_a_loss_that_is_not_finite_stops_before_the_coefficients_are_spoilt() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models, tasks=["a", "b"])

    def broken(shot: Shot) -> Tensor:
        value = shot.outputs.square().mean()
        return value * torch.nan if shot.task == "b" else value

    with pytest.raises(DataError, match=r"loss is nan at step 1 for task 'b'"):
        learn(merged, broken, {"a": inputs(), "b": inputs()}, steps=3)
    assert merged.way.coefficients()["all"].tolist() == [0.3, 0.3]
    one = Mergeable(Small(), base, models)
    with pytest.raises(DataError, match="gradient of the coefficients is NaN or infinite at step 1"):
        learn(one, lambda s: s.outputs.sub(s.outputs).pow(0.5).sum(), inputs(), steps=3)
    assert one.way.coefficients()["all"].tolist() == [0.3, 0.3]
    calls = []

    def late(shot: Shot) -> Tensor:
        calls.append(1)
        return shot.outputs.square().mean() * (torch.nan if len(calls) == 3 else 1)

    with pytest.raises(DataError, match="validation data is nan after 1 steps"):
        learn(one, late, inputs(), steps=2, batch=12, validation=inputs(), every=1)
    with pytest.raises(UsageError, match="does not depend on the merged weights"):
        learn(one, lambda s: torch.ones(()), inputs(), steps=1)


def test_requests_that_cannot_be_meant_say_what_is_wrong() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models)
    for settings, message in (
        ({"loss": "entropi"}, "did you mean 'entropy'"), ({"steps": -1}, "cannot be -1 steps"),
        ({"every": 2}, "between looks at validation"), ({"optimizer": "adma"}, "did you mean 'adam'"),
        ({"lr": float("nan")}, "lr must be"), ({"schedule": "cos"}, "no schedule"), ({"batch": 0}, "batch must"),
        ({"warmup": 9}, "warmup must be"), ({"data": inputs()}, "needs labels: give"),
        ({"data": (inputs(), labels() + 7)}, "go from 7 to 9, but the model has 3 outputs"),
        ({"data": (inputs(), labels() - 1)}, "go from -1"), ({"loss": lambda s: s.outputs}, r"not \[12, 3\]"),
        ({"data": (inputs(), labels().double())}, "not numbers of classes"), ({"loss": lambda s: 1.0}, "not float"),
        ({"loss": "distill"}, "name the tasks"),
        ({"data": []}, "no batches"), ({"loss": 3}, "no loss 3"),
        ({"data": (inputs()[..., :3], labels())}, r"Small cannot be run on this batch \(\[12, 2, 3\]\)"),
        ({"data": {"a": inputs(), "b": inputs()}, "loss": "entropy"}, "unexpected keyword argument 'a'"),
    ):  # fmt: skip
        asked = {"loss": "cross_entropy", "data": DATA, "steps": 2, "batch": 12, **settings}
        with pytest.raises((UsageError, DataError), match=message):
            learn(merged, asked.pop("loss"), asked.pop("data"), **asked)  # type: ignore[arg-type]
    frozen = Mergeable(Small(), base, models)
    frozen.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing of this merge is left to train"):
        full_batch(frozen, steps=1)
    named = Mergeable(Small(), base, models, tasks=["a", "b"])
    with pytest.raises(Problems, match=r"'c': no such task"):
        learn(named, "entropy", {"a": inputs(), "c": inputs()}, steps=1)
    with pytest.raises(UsageError, match="needs labels for task 'b'"):
        learn(named, "cross_entropy", {"a": DATA, "b": inputs()}, steps=1)


def test_experts_with_other_heads_are_told_apart_and_private_heads_help(tmp_path: Path) -> None:
    base, models = family(2)
    head = nn.Linear(16, 5, dtype=torch.float64).state_dict()
    wide = {**models[1].state_dict(), **{f"head.{n}": t for n, t in head.items()}}
    with pytest.raises(DataProblems, match=r"head.weight: shape \[5, 16\].*\[3, 16\] in the module") as told:
        Mergeable(Small(), base, [models[0], wide], tasks=["a", "b"])
    assert "private=" in str(told.value)
    for train in (False, True):
        merged = Mergeable(
            Small(), base, [models[0], wide], tasks=["a", "b"], private=["head.*"], train_private=train
        )
        data = {"a": DATA, "b": (inputs(seed=3), labels(seed=4) + 2)}  # classes 2, 3 and 4
        found = learn(merged, "cross_entropy", data, steps=3, batch=12, lr=0.01)
        weft.save(found.checkpoint("b"), tmp_path / str(train))
        state = weft.load(tmp_path / str(train)).state_dict()
        assert state["head.weight"].shape == (5, 16)
        assert torch.equal(state["head.weight"], head["weight"]) is not train
        net = Small()
        net.head = nn.Linear(16, 5, dtype=torch.float64)
        torch.testing.assert_close(weft.materialize(state, net)(inputs()), merged(inputs(), task="b"))
        assert found.checkpoint().info("head.weight").shape == (3, 16)


def test_the_module_and_the_models_stay_as_they_were() -> None:
    base, models = family(2)
    module = Small().train()
    before = {n: p.clone() for n, p in module.state_dict().items()}
    merged = Mergeable(module, base, models)
    full_batch(merged, steps=2, lr=0.1)
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
    assert all(torch.equal(p, before[n]) for n, p in module.state_dict().items())
    own = dict(module.named_parameters())
    assert all(p.data_ptr() == own[n].data_ptr() for n, p in merged.inner.named_parameters())  # not copied
    assert all(p.grad is None for m in models for p in m.parameters())


def test_weft_learn_is_the_verb_and_the_room() -> None:
    base, models = family(2)
    found = weft.learn(weft.learn.Mergeable(Small(), base, models), "entropy", inputs(), steps=1)
    assert isinstance(found, Learned) and isinstance(found.merged.inner, nn.Module)
    assert "adamerging" in weft.learn.__all__ and weft.learn.adamerging is not None
    with pytest.raises(AttributeError, match="no attribute 'adamergin'"):
        weft.learn.adamergin  # noqa: B018
