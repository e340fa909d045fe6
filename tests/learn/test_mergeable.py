"""`Mergeable`: weights, gradients, checkpoints and recipes against a dense float64 reference."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from small_nets import Small, dense, family, inputs, labels, near
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import weft
from weft.errors import DataError, DataProblems, Problems, UsageError
from weft.learn import Blocks, Mergeable
from weft.learn.losses import Shot, entropy
from weft.statistics.batches import as_batch


def last_word(name: str) -> str:
    """A partition by kind of parameter: weights, biases."""
    return name.rpartition(".")[2]


PARTS = ["model", "layer", "tensor", "row", "column", "element", Blocks(3), last_word]


def scattered(merged: Mergeable, seed: int = 5) -> None:
    """Coefficients that are all different."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in merged.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.4)


def full(merged: Mergeable) -> dict[str, list[Tensor]]:
    """A leaf for every entry's coefficient."""
    way = merged.way
    tables = way.tables()  # type: ignore[attr-defined]
    made = {}
    for name, place in way.places.items():  # type: ignore[attr-defined]
        c = tables[place.key].detach()
        made[name] = [place.spread(ci).expand(place.of).clone().requires_grad_() for ci in c]
    return made


@pytest.mark.parametrize("parts", PARTS, ids=lambda p: getattr(p, "__name__", str(p)))
@pytest.mark.parametrize("with_base", [True, False])
def test_weights_gradients_and_checkpoint_are_the_formula_s(parts: object, with_base: bool) -> None:
    base, models = family()
    merged = Mergeable(Small(), base if with_base else None, models, parts)  # type: ignore[arg-type]
    scattered(merged)
    dense_c = full(merged)
    expected = dense(base if with_base else None, models, dense_c)
    for name, theta in merged.weights().items():
        torch.testing.assert_close(theta, expected[name])
    x, y = inputs(), labels()
    F.cross_entropy(functional_call(Small(), expected, (x,)), y).backward()
    F.cross_entropy(merged(x), y).backward()
    way = merged.way
    for key, phi in zip(way.keys, way.phi, strict=True):  # type: ignore[attr-defined]
        mine = [n for n, p in way.places.items() if p.key == key]  # type: ignore[attr-defined]
        for i in range(3):
            reference = sum(way.places[n].gathered(dense_c[n][i].grad) for n in mine)  # type: ignore[attr-defined]
            torch.testing.assert_close(phi.grad[i], reference)
    made = merged.checkpoint()
    for name in made:
        torch.testing.assert_close(made.tensor(name), expected[name].detach(), rtol=1e-12, atol=1e-13)
        flat = made.read(name)
        n = flat.numel()
        assert torch.equal(torch.cat([made.read(name, 0, n // 3), made.read(name, n // 3, n)]), flat)


def test_gradients_are_finite_differences() -> None:
    base, models = family(2)
    merged, (x, y) = Mergeable(Small(), base, models, "tensor"), (inputs(), labels())
    scattered(merged)
    F.cross_entropy(merged(x), y).backward()
    phi = merged.way.phi[0]  # type: ignore[attr-defined]
    for i in range(2):
        ends = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                phi[i] += h
                ends.append(float(F.cross_entropy(merged(x), y)))
                phi[i] -= h
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(phi.grad[i]), rel=1e-5, abs=1e-9)


def test_tied_coefficients_of_tensors_are_those_of_models_and_zero_is_the_base() -> None:
    base, models = family()
    one = Mergeable(Small(), base, models, "model", start=[0.5, -0.1, 0.2])
    each = Mergeable(Small(), base, models, "tensor", start=[0.5, -0.1, 0.2])
    for name, theta in one.weights().items():
        torch.testing.assert_close(theta, each.weights()[name])
    zero = Mergeable(Small(), base, models, "element", start=0.0)
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in zero.weights().items())
    F.cross_entropy(one(inputs()), labels()).backward()
    F.cross_entropy(each(inputs()), labels()).backward()
    summed = sum(p.grad for p in each.parameters())
    torch.testing.assert_close(next(one.parameters()).grad, summed)


def test_it_starts_at_the_usual_places() -> None:
    base, models = family()
    assert Mergeable(Small(), base, models).way.coefficients()["all"].tolist() == [0.3] * 3
    for constraint in ("free", "simplex", "affine"):
        made = Mergeable(Small(), None, models, constraint=constraint).way.coefficients()["all"]
        torch.testing.assert_close(made, torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("parts", ["model", "layer", "tensor"])
@pytest.mark.parametrize("with_base", [True, False])
def test_a_recipe_says_the_same(parts: str, with_base: bool, tmp_path: Path) -> None:
    base, models = family(2)
    for name, m in zip(("base", "a", "b"), [base, *models], strict=True):
        weft.save(m, tmp_path / name)
    paths = [str(tmp_path / n) for n in ("a", "b")]
    anchor = str(tmp_path / "base") if with_base else None
    found = weft.learn(
        Mergeable(Small(), anchor, paths, parts), "cross_entropy", (inputs(), labels()), steps=3, lr=0.1
    )
    built = weft.build(found.recipe(anchor, paths))
    made = found.checkpoint()
    for name in made:
        torch.testing.assert_close(built.tensor(name), made.tensor(name), rtol=1e-12, atol=1e-13)
    weft.save(made, tmp_path / "out")
    saved = weft.load(tmp_path / "out")
    assert made.identity() is not None
    assert all(torch.equal(saved.tensor(n), made.tensor(n, dtype=torch.float64)) for n in made)


def test_what_does_not_fit_a_recipe_says_so() -> None:
    base, models = family(2)
    rows = weft.learn(Mergeable(Small(), base, models, "row"), "entropy", inputs(), steps=1)
    with pytest.raises(UsageError, match="save the checkpoint"):
        rows.recipe()


def test_models_are_kept_once_and_not_at_all_when_asked() -> None:
    base, models = family()
    kept, read = (Mergeable(Small(), base, models, "tensor", hold=h) for h in (True, False))
    size = sum(p.nbytes for p in base.parameters())
    for merged in (kept, read):
        entropy(Shot(merged, merged.weights(), as_batch(inputs()))).backward()
    assert kept.sources.held_bytes == 4 * size and read.sources.held_bytes == 0
    for a, b in zip(kept.parameters(), read.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_half_precision_modules_are_merged_in_single() -> None:
    base, models = family(2, torch.bfloat16)
    merged = Mergeable(Small(torch.bfloat16), base, models, "tensor", start=0.25)
    assert all(w.dtype == torch.float32 for w in merged.weights().values())
    out = merged(inputs(dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in merged.parameters())
    assert all(merged.checkpoint().info(n).dtype == torch.bfloat16 for n in merged.checkpoint())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(torch.relu(self.norm(self.linear(x)))))
        return out


def test_running_statistics_are_the_mean_s_and_dropout_is_off() -> None:
    base = Normed()
    models = [near(base, i) for i in (1, 2)]
    for i, m in enumerate(models):
        m.norm.running_var.fill_(i + 1.0)  # type: ignore[union-attr, operator]
        m.norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr, operator]
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    merged = Mergeable(base.train(), base, models, start=[0.2, 0.3])
    assert base.training and torch.equal(merged(x), merged(x))
    made = merged.checkpoint()
    assert made.tensor("norm.running_var").tolist() == [1.5] * 8
    assert int(made.tensor("norm.num_batches_tracked")) == 0  # the base's
    filled = weft.materialize(made, Normed()).eval()
    torch.testing.assert_close(filled(x), merged(x))

    batch = Mergeable(base, base, models, norms="batch", start=[0.2, 0.3])
    before = {n: b.clone() for n, b in batch.inner.named_buffers()}
    filled.norm.train()  # type: ignore[union-attr]
    torch.testing.assert_close(filled(x), batch(x))
    assert all(torch.equal(b, before[n]) for n, b in batch.inner.named_buffers())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.embed(x)))
        return out


def test_tied_weights_have_one_coefficient_and_stay_tied() -> None:
    base = Tied()
    models = [near(base, i) for i in (1, 2)]
    x = torch.randint(10, (6,))
    merged = Mergeable(Tied(), base, models, "tensor", start=[0.4, 0.1])
    assert list(merged.way.coefficients()) == ["embed.weight"]
    filled = weft.materialize(merged.checkpoint(), Tied())
    torch.testing.assert_close(filled(x), merged(x))
    # a file that keeps the tied tensor under its other name
    renamed = [{"out.weight": m.state_dict()["out.weight"].clone()} for m in (base, *models)]
    other = Mergeable(Tied(), renamed[0], renamed[1:], "tensor", start=[0.4, 0.1])
    torch.testing.assert_close(other(x), merged(x))
    assert list(other.checkpoint()) == ["out.weight"]
    torch.testing.assert_close(
        other.checkpoint().tensor("out.weight"), merged.checkpoint().tensor("embed.weight")
    )


def test_private_parameters_are_the_task_s_own() -> None:
    base, models = family(2)
    merged = Mergeable(Small(), base, models, start=0.5, tasks=["a", "b"], private=["head.*"])
    assert not any(n.startswith("head") for n in merged.weights())
    x = inputs()
    for i, task in enumerate(("a", "b")):
        made = merged.checkpoint(task)
        assert torch.equal(made.tensor("head.weight"), models[i].state_dict()["head.weight"])
        torch.testing.assert_close(weft.materialize(made, Small())(x), merged(x, task=task))
    shared = merged.checkpoint()
    assert torch.equal(shared.tensor("head.weight"), base.state_dict()["head.weight"])
    torch.testing.assert_close(weft.materialize(shared, Small())(x), merged(x))


def test_a_hundred_adapters_are_task_vectors_too(tmp_path: Path) -> None:
    """Low-rank task vectors: models that are adapters on the base, read from their factors."""
    base, models = family(2, torch.float32)
    for i, m in enumerate(models):
        weft.save(weft.extract_lora(m, base, rank=2), tmp_path / f"a{i}")
    lifted = [weft.apply_adapters(base, [tmp_path / f"a{i}"]) for i in range(2)]
    merged = Mergeable(Small(torch.float32), base, lifted, "tensor", hold=False, start=[0.7, 0.2])
    task = lifted[0].tensor("layers.0.weight").float() - base.state_dict()["layers.0.weight"]
    assert int(torch.linalg.matrix_rank(task, rtol=1e-4)) == 2
    made = merged.weights()["layers.0.weight"]
    other = lifted[1].tensor("layers.0.weight").float() - base.state_dict()["layers.0.weight"]
    torch.testing.assert_close(made, base.state_dict()["layers.0.weight"] + 0.7 * task + 0.2 * other)


def test_models_that_do_not_fit_are_refused() -> None:
    base, models = family(2)
    with pytest.raises(DataProblems, match=r"head.weight: shape \[2, 16\]"):
        bad = {**models[0].state_dict(), "head.weight": torch.zeros(2, 16)}
        Mergeable(Small(), base, [bad, models[1]])
    lacking = {n: t for n, t in models[0].state_dict().items() if not n.startswith("conv")}
    with pytest.raises(DataProblems, match=r"conv\.bias: not in"):
        Mergeable(Small(), base, [lacking])
    spoiled = copy.deepcopy(models[0])
    with torch.no_grad():
        spoiled.head.bias[1] = torch.nan  # type: ignore[union-attr, operator, index]
    with pytest.raises(DataError, match=r"head\.bias: 1 NaN"):
        Mergeable(Small(), base, [spoiled]).weights()


def test_requests_that_cannot_be_meant_are_refused() -> None:
    base, models = family(2)
    for settings, message in (
        ({"tasks": ["a"]}, "2 different names"), ({"private": ["head.*"]}, "name them"),
        ({"private": ["haed.*"], "tasks": ["a", "b"]}, "no parameter is called so"),
        ({"private": ["*"], "tasks": ["a", "b"]}, "nothing to merge"), ({"norms": "none"}, "mean or batch"),
        ({"start": {"wrong": torch.zeros(2)}}, "other parts"), ({"fixed": {"t": 1}}, "name it"),
        ({"method": "ties", "way": lambda s, n: None}, "not both"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            Mergeable(Small(), base, models, **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a list"):
        Mergeable(Small(), base, models[0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no parameters"):
        Mergeable(nn.ReLU(), None, models)
    merged = Mergeable(Small(), base, models, tasks=["rotated", "b"])
    with pytest.raises(UsageError, match="did you mean 'rotated'"):
        merged.checkpoint("rotate") if merged.private else merged.index("rotate")
    with pytest.raises(Problems, match="did you mean 'head'"), merged.watched(["haed"]):
        pass


def test_inner_products_are_those_of_whole_vectors_taken_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.learn.sources._SLICE", 7)
    base, models = family(3)
    for anchor in (base, None):
        sources = Mergeable(Small(), anchor, models).sources
        start = 0 if anchor is None else torch.cat([t.flatten() for t in base.state_dict().values()])
        rows = torch.stack(
            [torch.cat([t.flatten() for t in m.state_dict().values()]) - start for m in models]
        )
        torch.testing.assert_close(sources.gram(sources.parameters), rows @ rows.T)
