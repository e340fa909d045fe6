"""AdaMerging, aTLAS, SyMerge, Expert Merging and DAM: what each trains, where it starts, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_nets import Small, family, inputs, labels
from torch import Tensor

import weft
from weft.errors import Problems, UsageError
from weft.learn import Blocks, adamerging, atlas, atlas_test_time, dam, expert_merging, symerge
from weft.learn.adaptive import elected
from weft.learn.losses import distill, trusted

TASKS = ["a", "b"]
UNLABELLED = {"a": inputs(24, 1), "b": inputs(24, 2)}


def test_layer_wise_with_tied_coefficients_is_task_wise() -> None:
    base, models = family(2)
    by_task = adamerging(Small(), base, models, UNLABELLED, tasks=TASKS, parts="model", steps=4, lr=0.02)
    tied = adamerging(
        Small(), base, models, UNLABELLED, tasks=TASKS, parts=lambda name: "all", steps=4, lr=0.02
    )
    assert by_task.losses == tied.losses and by_task.test_time
    assert torch.equal(by_task.coefficients["all"], tied.coefficients["all"])


def test_the_clamp_keeps_coefficients_in_0_to_1() -> None:
    base, models = family(2)
    found = adamerging(Small(), base, models, UNLABELLED, tasks=TASKS, steps=40, lr=0.2)
    table = torch.stack(list(found.coefficients.values()))
    assert float(table.min()) >= 0 and float(table.max()) <= 1 and float(table.max() - table.min()) == 1


def test_elected_vectors_are_those_that_ties_adds_up() -> None:
    base, models = family(3)
    found = elected(base, models, density=0.4)
    start = base.state_dict()
    states = [m.state_dict() for m in models]
    names = list(start)
    tau = torch.stack([torch.cat([(s[n] - start[n]).flatten() for n in names]) for s in states])
    kept = torch.stack([torch.where(t.abs() >= t.abs().topk(int(0.4 * len(t)))[0][-1], t, 0.0) for t in tau])
    sign = kept.sum(0).sign()
    chosen = torch.where(kept.sign() == sign, kept, 0.0)
    for row, made in zip(chosen, found, strict=True):
        flat = torch.cat([(made.tensor(n) - start[n]).flatten() for n in names])
        torch.testing.assert_close(flat, row, rtol=1e-9, atol=1e-12)


def test_plus_learns_on_elected_vectors_and_is_no_recipe(tmp_path: Path) -> None:
    base, models = family(2)
    found = adamerging(Small(), base, models, UNLABELLED, tasks=TASKS, plus=True, steps=3, lr=0.05)
    made = found.checkpoint()
    chosen = elected(base, models)
    for n in made:
        theta0, c = base.state_dict()[n], found.coefficients[n]
        expected = theta0 + sum(ci * (e.tensor(n) - theta0) for ci, e in zip(c, chosen, strict=True))
        torch.testing.assert_close(made.tensor(n), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(UsageError, match="a recipe cannot load"):
        found.recipe("base")
    weft.save(made, tmp_path / "out")
    assert torch.equal(weft.load(tmp_path / "out").tensor("head.bias"), made.tensor("head.bias"))


def test_atlas_starts_at_the_base_and_splits_matrices_only() -> None:
    base, models = family(2)
    start = atlas(Small(), base, models, (inputs(), labels()), steps=0)
    assert all(torch.equal(start.checkpoint().tensor(n), t) for n, t in base.state_dict().items())
    found = atlas(Small(), base, models, (inputs(), labels()), parts=Blocks(3), steps=5, batch=12)
    shapes = {n: tuple(c.shape) for n, c in found.coefficients.items()}
    assert shapes["layers.0.weight"] == (2, 3) and shapes["layers.0.bias"] == (2,)
    assert found.losses[-1] < found.losses[0] and found.split == "few-shot"
    filled = weft.materialize(found.checkpoint(), Small())
    torch.testing.assert_close(filled(inputs()), found.merged(inputs()))


def test_atlas_on_test_inputs_keeps_the_labels_that_the_base_is_surest_of() -> None:
    base, models = family(2)
    x, seen = inputs(60, 4), []

    def strong(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch * 0.9

    def run(**how: object) -> list[float]:
        return atlas_test_time(Small(), base, models, x, strong, steps=3, batch=10, **how).losses  # type: ignore[arg-type, no-any-return]

    one = run()
    assert one == run() != run(seed=1) and one != run(compat=True)
    labelled = trusted(base(x).softmax(-1))
    known = x[labelled >= 0]
    for batch in seen[:3]:  # half of every batch are of the trusted
        assert all(any(torch.equal(row, k) for k in known) for row in batch[:5])
    found = atlas_test_time(Small(), base, models, x, strong, steps=1)
    assert found.test_time
    with pytest.raises(UsageError, match="one tensor"):
        atlas_test_time(Small(), base, models, x[:0], strong)


def test_symerge_trains_a_layer_a_task_and_keeps_it_with_the_task() -> None:
    base, models = family(2)
    found = symerge(Small(), base, models, UNLABELLED, tasks=TASKS, layer=["layers.1.*"], steps=5, lr=0.02)
    assert found.losses[-1] < found.losses[0] and found.test_time
    assert not any(n.startswith("layers.1") for n in found.coefficients)
    for i, task in enumerate(TASKS):
        made = found.checkpoint(task)
        own = models[i].state_dict()["layers.1.weight"]
        assert 0 < float((made.tensor("layers.1.weight") - own).abs().max()) < 0.2
        filled = weft.materialize(made, Small())
        torch.testing.assert_close(filled(inputs()), found.merged(inputs(), task=task))
    with pytest.raises(UsageError, match="private parameters do not fit a recipe"):
        found.recipe("base", ["a", "b"])


@pytest.mark.parametrize("align_to", ["both", "hidden", "logits"])
def test_expert_merging_comes_nearer_to_the_experts(align_to: str) -> None:
    base, models = family(2)
    layers = ["layers.0", "layers.1"]
    found = expert_merging(
        Small(), base, models, UNLABELLED, tasks=TASKS, align_to=align_to,  # type: ignore[arg-type]
        layers=() if align_to == "logits" else layers, steps=40, lr=0.1, batch=24,
    )  # fmt: skip
    assert list(found.coefficients) == ["conv", "layers.0", "layers.1", "head"] and not found.test_time
    assert found.losses[-1] < 0.95 * found.losses[0]


def test_expert_merging_asks_for_layers_and_known_targets() -> None:
    base, models = family(2)
    with pytest.raises(UsageError, match="say which layers"):
        expert_merging(Small(), base, models, UNLABELLED, tasks=TASKS)
    with pytest.raises(UsageError, match="both, logits or hidden"):
        expert_merging(Small(), base, models, UNLABELLED, tasks=TASKS, align_to="output")  # type: ignore[arg-type]
    with pytest.raises(Problems, match="did you mean 'head'"):
        expert_merging(Small(), base, models, UNLABELLED, tasks=TASKS, layers=["haed"], steps=1)


def test_dam_has_a_share_a_column_from_equal_ones() -> None:
    _, models = family(2)
    start = dam(Small(), models, UNLABELLED, tasks=TASKS, steps=0)
    mean = weft.merge(models, "linear")
    for n in mean:
        torch.testing.assert_close(start.checkpoint().tensor(n), mean.tensor(n), rtol=1e-12, atol=1e-12)
    found = dam(Small(), models, UNLABELLED, tasks=TASKS, steps=30, lr=0.02, batch=24)
    assert found.coefficients["layers.0.weight"].shape == (2, 1, 16)
    assert found.losses[-1] < 0.9 * found.losses[0]
    assert distill() is not None and found.split == "unlabelled"


def test_adapters_over_a_base_are_models(tmp_path: Path) -> None:
    base, models = family(2, torch.float32)
    weft.save(base, tmp_path / "base")
    for i, m in enumerate(models):
        weft.save(weft.extract_lora(m, base, rank=2), tmp_path / f"adapter{i}")
    experts = [weft.load(tmp_path / f"adapter{i}", base=tmp_path / "base") for i in range(2)]
    data = {t: x.float() for t, x in UNLABELLED.items()}
    found = adamerging(
        Small(torch.float32), tmp_path / "base", experts, data, tasks=TASKS, steps=3, lr=0.05, hold=False
    )
    made = found.checkpoint()
    built = weft.build(found.recipe(models=[f"{tmp_path}/base+{tmp_path}/adapter{i}" for i in range(2)]))
    for n in made:
        torch.testing.assert_close(built.tensor(n), made.tensor(n))
    torch.testing.assert_close(
        weft.materialize(made, Small(torch.float32))(data["a"]), found.merged(data["a"]).detach()
    )
