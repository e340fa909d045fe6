"""Parameters of any method learned by gradient: the derivative, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_nets import Small, family, inputs, labels, near
from torch import nn
from torch.nn import functional as F

import weft
from weft.errors import UsageError
from weft.learn import Mergeable, learn


def loss_at(method: str, base: object, models: list[nn.Module], **params: object) -> float:
    made = weft.materialize(weft.merge(models, method, base=base, **params), Small())  # type: ignore[arg-type]
    return float(F.cross_entropy(made(inputs()), labels()).detach())


@pytest.mark.parametrize(
    ("method", "with_base", "learned", "fixed"),
    [
        ("linear", False, {"weight": [0.4, 0.9]}, {"normalize": True}),
        ("task_arithmetic", True, {"scale": 0.6}, {}),
        ("slerp", False, {"t": 0.3}, {}),
        ("ties", True, {"scale": 0.7, "weight": [1.0, 0.5]}, {"density": 0.5}),
    ],
)
def test_gradients_are_those_of_the_loss_of_the_merge(
    method: str, with_base: bool, learned: dict[str, object], fixed: dict[str, object]
) -> None:
    base, models = family(2)
    anchor = base if with_base else None
    merged = Mergeable(Small(), anchor, models, method=method, learned=learned, fixed=fixed)
    F.cross_entropy(merged(inputs()), labels()).backward()
    h = 1e-5
    for (name, value), phi in zip(learned.items(), merged.way.phi, strict=True):  # type: ignore[attr-defined]
        entries = range(len(value)) if isinstance(value, list) else [None]
        for i in entries:
            ends = []
            for d in (-h, h):
                moved = value + d if i is None else [v + d * (j == i) for j, v in enumerate(value)]  # type: ignore[operator, arg-type]
                ends.append(loss_at(method, anchor, models, **{**learned, **fixed, name: moved}))
            slope = (ends[1] - ends[0]) / (2 * h)
            assert float(phi.grad if i is None else phi.grad[i]) == pytest.approx(slope, rel=2e-3, abs=1e-6)


def test_weights_and_checkpoint_are_the_merge_itself(tmp_path: Path) -> None:
    base, models = family(3)
    for name, m in zip(("base", "a", "b", "c"), [base, *models], strict=True):
        weft.save(m, tmp_path / name)
    paths = [str(tmp_path / n) for n in "abc"]
    merged = Mergeable(
        Small(), str(tmp_path / "base"), paths, method="ties", learned={"density": 0.4, "scale": 1.0},
        fixed={"scope": "model"},
    )  # fmt: skip
    found = learn(merged, "cross_entropy", (inputs(), labels()), steps=15, lr=0.05, batch=12)
    assert found.losses[-1] < found.losses[0]
    values = {n: float(v) for n, v in found.coefficients.items()}
    assert 0 < values["density"] <= 1 and values["scale"] != 1.0
    again = weft.merge(paths, "ties", base=str(tmp_path / "base"), scope="model", **values)
    made, built = found.checkpoint(), weft.build(found.recipe())
    weights = merged.weights()
    for n in made:
        assert torch.equal(made.tensor(n), again.tensor(n))
        torch.testing.assert_close(weights[n], made.tensor(n), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(built.tensor(n), made.tensor(n), rtol=1e-12, atol=1e-12)


def test_parameters_stay_where_the_method_allows() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models, method="ties", learned={"density": 0.95})
    found = learn(merged, lambda s: s.outputs.square().mean() * -1, inputs(), steps=20, lr=0.2, batch=12)
    assert 0 < float(found.coefficients["density"]) <= 1


def test_random_masks_are_those_that_are_saved() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models, method="dare_linear", learned={"scale": 0.5})
    found = learn(merged, "cross_entropy", (inputs(), labels()), steps=2, batch=12)
    made = weft.materialize(found.checkpoint(), Small())
    torch.testing.assert_close(made(inputs()), merged(inputs()))


def test_private_heads_go_with_a_method() -> None:
    base, models = family(2)
    wide = {
        **models[1].state_dict(),
        **{f"head.{n}": t for n, t in nn.Linear(16, 5).double().state_dict().items()},
    }
    merged = Mergeable(
        Small(), base, [models[0], wide], tasks=["a", "b"], private=["head.*"], method="ties",
        learned={"scale": 0.5},
    )  # fmt: skip
    found = learn(merged, "entropy", {"a": inputs(), "b": inputs()}, steps=2)
    net = Small()
    net.head = nn.Linear(16, 5, dtype=torch.float64)
    torch.testing.assert_close(
        weft.materialize(found.checkpoint("b"), net)(inputs()), merged(inputs(), task="b")
    )


def test_what_cannot_be_learned_is_refused() -> None:
    base, models = family(2)
    for settings, message in (
        ({"method": "ties"}, "which parameters of ties"),
        ({"method": "ties", "learned": {"densty": 0.1}}, "did you mean 'density'"),
        ({"method": "ties", "learned": {"elect": 0.1}}, "that is a number"),
        ({"method": "ties", "learned": {"density": 7.0}}, "density"),
        ({"method": "ties", "learned": {"density": 0.5}, "fixed": {"elct": 1}}, "elct"),
        ({"method": "tiess", "learned": {"density": 0.5}}, "did you mean"),
        ({"method": "slerp", "learned": {"t": 0.5}}, "base"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            Mergeable(Small(), base, models, **settings)  # type: ignore[arg-type]

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.norm(x)
            return out

    net = Normed()
    with pytest.raises(UsageError, match="norms='batch'"):
        Mergeable(net, net, [near(net, 1)], method="ties", learned={"scale": 1.0})
