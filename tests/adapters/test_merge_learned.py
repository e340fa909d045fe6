"""LoraHub's search and LoRA Soups' gradients, on a target that is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging_models import NAMES, Net, config, saved, with_adapters
from torch import Tensor

from weft.adapters.factors import as_adapter
from weft.adapters.hub import lorahub
from weft.adapters.lowrank import difference
from weft.adapters.merge import merge_adapters
from weft.adapters.output import AdapterCheckpoint
from weft.adapters.soups import learn_soup
from weft.errors import DataError, UsageError

pytest.importorskip("peft")
Batch = tuple[Tensor, Tensor]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return list(saved(with_adapters({"a": config(3, 3), "b": config(3, 3)}), tmp_path).values())


def target(paths: list[Path], table: dict[str, list[float]]) -> tuple[Net, list[Batch]]:
    """The module with a known mixture in it, and what it computes."""
    made = merge_adapters(paths, table, how="concat")
    net = Net()
    state = net.state_dict()
    for name in NAMES:
        state[name] = state[name] + made.factors(name).delta().float()
    net.load_state_dict(state)
    x = torch.randn(6, 32, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net, [(v, net(v)) for v in x]


def squared(model: object, batch: Batch) -> Tensor:
    x, y = batch
    made: Tensor = model(x)  # type: ignore[operator]
    return (made - y).square().mean()


def test_gradients_find_the_mixture_of_every_tensor(two: list[Path]) -> None:
    table = {NAMES[0]: [0.9, -0.3], NAMES[1]: [0.2, 0.6]}
    _, batches = target(two, table)
    base = Net()
    before = {n: t.clone() for n, t in base.state_dict().items()}
    soup = learn_soup(base, two, squared, batches, per="tensor", steps=400, rate=0.02)
    assert soup.losses[-1] < 1e-4 * soup.losses[0]
    for name, expected in table.items():
        assert soup.weights[name] == pytest.approx(expected, abs=0.02)
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items()), "the base is not changed"
    exact = merge_adapters(two, soup.weights, how="concat")
    assert difference(soup.adapter.factors(NAMES[0]), exact.factors(NAMES[0])) < 1e-12
    again = learn_soup(base, two, squared, batches, per="tensor", steps=20)
    assert again.losses == learn_soup(base, two, squared, batches, per="tensor", steps=20).losses


def test_groups_share_their_weights_and_a_simplex_is_one(two: list[Path]) -> None:
    _, batches = target(two, {n: [0.7, 0.3] for n in NAMES})
    one = learn_soup(Net(), two, squared, batches, per="model", simplex=True, steps=150)
    assert one.weights[NAMES[0]] == one.weights[NAMES[1]] == pytest.approx([0.7, 0.3], abs=0.02)
    assert sum(one.weights[NAMES[0]]) == pytest.approx(1.0)
    layered = learn_soup(Net(), two, squared, batches, per="layer", steps=5)
    assert layered.weights[NAMES[0]] != layered.weights[NAMES[1]], "outside blocks every tensor has its own"


def test_what_cannot_be_learned_is_refused(two: list[Path]) -> None:
    _, batches = target(two, {n: [0.7, 0.3] for n in NAMES})
    with pytest.raises(UsageError, match="2 starting weights"):
        learn_soup(Net(), two, squared, batches, start=[1.0])
    with pytest.raises(UsageError, match="no batches"):
        learn_soup(Net(), two, squared, [])
    with pytest.raises(DataError, match="the loss is nan at step 0"):
        learn_soup(Net(), two, lambda model, batch: squared(model, batch) * float("nan"), batches)
    with pytest.raises(DataError, match="does not fit"):
        learn_soup(torch.nn.Linear(3, 3), two, squared, batches)


# -- LoraHub -----------------------------------------------------------------------------------------


def loss_to(paths: list[Path], weights: list[float], how: str) -> tuple[AdapterCheckpoint, float]:
    made = merge_adapters(paths, weights, how=how)
    return made, float(sum(made.factors(n).delta().square().sum() for n in NAMES))


@pytest.mark.parametrize("how", ["factorwise", "concat"])
def test_lorahub_finds_a_known_mixture(two: list[Path], how: str) -> None:
    pytest.importorskip("optuna")
    goal, size = loss_to(two, [0.8, -0.4], how)
    wanted = {n: goal.factors(n).delta() for n in NAMES}

    def loss(adapter: AdapterCheckpoint) -> float:
        return float(sum((adapter.factors(n).delta() - wanted[n]).square().sum() for n in NAMES)) / size

    found = lorahub(two, loss, how=how, budget=90, penalty=0.0, seed=1)
    assert found.tried[0] == ([0.0, 0.0], pytest.approx(1.0)), "the base alone comes first"
    assert found.loss < 0.02 and found.loss == min(v for _, v in found.tried)
    sign = (
        1.0 if how == "concat" or found.weights[0] > 0 else -1.0
    )  # adding factors is blind to a common sign
    assert [sign * w for w in found.weights] == pytest.approx([0.8, -0.4], abs=0.1)
    assert loss(found.adapter) == pytest.approx(found.loss)
    again = lorahub(two, loss, how=how, budget=20, penalty=0.0, seed=1)
    assert again.tried == found.tried[:20]


def test_lorahub_pays_for_weights_and_survives_a_loss_that_is_not_finite(two: list[Path]) -> None:
    pytest.importorskip("optuna")
    heavy = lorahub(two, lambda a: 0.0, budget=12, penalty=1.0)
    assert heavy.weights == [0.0, 0.0]
    odd = iter([float("nan"), float("inf"), 0.5, 0.1, 0.4, 0.3])
    found = lorahub(two, lambda a: next(odd), budget=6, start=[[1.0, 0.0]], penalty=0.0)
    assert found.loss == 0.1 and found.tried[1][0] == [1.0, 0.0]
    with pytest.raises(UsageError, match="finite for none"):
        lorahub(two, lambda a: float("nan"), budget=2)
    with pytest.raises(UsageError, match="every start"):
        lorahub(two, lambda a: 0.0, start=[[1.0]])


def test_adapters_may_come_in_any_form(two: list[Path]) -> None:
    pytest.importorskip("optuna")
    found = lorahub([as_adapter(two[0]), two[1]], lambda a: 1.0, how="svd", rank=2, budget=3)
    assert found.adapter.adapter_config["r"] == 2
