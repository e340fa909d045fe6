"""Weight matching: a planted permutation is found, the objective only rises, nonsense is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import IMAGE, KINDS, made, mlp, shaken
from torch import Tensor, nn

import weft
from weft.align import PermutationSpec, agreement, discover, reordered, weight_matching
from weft.align.pair import Pair
from weft.align.weights import Ascent
from weft.errors import DataError, DataProblems, UsageError


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "recurrent"])
def test_a_planted_permutation_is_found(kind: str) -> None:
    net = made(kind)
    spec = discover(net, KINDS[kind].inputs)
    planted = spec.random(5)
    found = weight_matching(spec, net, spec.apply(net, planted))
    for name, there in spec.compose(planted, found).items():
        assert torch.equal(there, spec.identity()[name]), name
    assert agreement(spec, net, spec.apply(net, planted), found) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["mlp", "resnet", "recurrent", "encoder", "resnext"])
def test_every_step_raises_the_inner_product_and_shrinks_the_distance(kind: str) -> None:
    a = made(kind)
    torch.manual_seed(7)
    b = shaken(KINDS[kind].make().double(), 7)
    spec = discover(a, KINDS[kind].inputs)
    pair = Pair(spec, weft.load(a), weft.load(b), ignore=())
    ascent, at = Ascent(spec, pair), spec.identity()

    def distance() -> float:
        moved = reordered(dict(b.state_dict()), spec, at)
        return float(
            sum(((t - moved[n]) ** 2).sum() for n, t in a.state_dict().items() if t.is_floating_point())
        )

    start = last = ascent.value(at)
    apart = first = distance()
    for _ in range(4):
        for root in ascent.roots:
            gain = ascent.improve(root, at)
            now, d = ascent.value(at), distance()
            assert gain >= 0 and now - last == pytest.approx(gain, rel=1e-6, abs=1e-9)
            assert apart - d == pytest.approx(2 * gain, rel=1e-6, abs=1e-9)
            last, apart = now, d
    assert last > start and apart < first


def test_one_step_is_the_best_of_all_permutations_of_one_group() -> None:
    """Against brute force, head dimensions within heads included: 2 heads of 3 dimensions."""
    from itertools import permutations

    spec = PermutationSpec.of(
        {"h": 2, "d": weft.align.Group(3, ("h",))}, {"q": ("h*d", 4), "b": ("h*d",), "o": (5, "h*d")}
    )
    generator = torch.Generator().manual_seed(0)
    a, b = ({n: torch.randn(s, generator=generator) for n, s in (("q", (6, 4)), ("b", (6,)), ("o", (5, 6)))}
            for _ in range(2))  # fmt: skip
    found = agreement(spec, a, b, weight_matching(spec, a, b))
    best = max(
        agreement(spec, a, b, {"h": torch.tensor(h), "d": torch.tensor([d, e])})
        for h in permutations(range(2)) for d in permutations(range(3)) for e in permutations(range(3))
    )  # fmt: skip
    assert found == pytest.approx(best, abs=1e-9)


def test_it_is_the_same_whatever_fits_into_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(900, 40), nn.ReLU(), nn.Linear(40, 3000)) for _ in range(2))
    spec = discover(a)
    for name, net in (("a", a), ("b", b)):
        weft.save(net, tmp_path / f"{name}.safetensors")
    whole = weight_matching(spec, a, b)
    little = weight_matching(spec, tmp_path / "a.safetensors", tmp_path / "b.safetensors", memory="900KiB")
    assert all(torch.equal(little[n], p) for n, p in whole.items())
    with pytest.raises(DataError, match=r"0.weight: .* more than the budget .* raise memory="):
        weight_matching(spec, tmp_path / "a.safetensors", tmp_path / "b.safetensors", memory="64KiB")


def test_the_seed_decides_and_more_tries_are_never_worse() -> None:
    a, b = mlp((20, 30, 30, 5), 0), mlp((20, 30, 30, 5), 1)
    spec = discover(a)
    first, again = weight_matching(spec, a, b, seed=4), weight_matching(spec, a, b, seed=4)
    assert all(torch.equal(first[n], p) for n, p in again.items())
    one = agreement(spec, a, b, first)
    assert agreement(spec, a, b, weight_matching(spec, a, b, seed=4, tries=5)) >= one


def test_the_group_in_the_most_tensors_is_visited_first() -> None:
    """By the first try; the second draws its order anew, so that more tries look elsewhere."""
    a, b = made("encoder"), shaken(KINDS["encoder"].make().double(), 7)
    spec = discover(a, KINDS["encoder"].inputs)
    visits: list[tuple[int, str]] = []
    for seed in range(4):
        weight_matching(
            spec, a, b, seed=seed, tries=2, sweeps=1, progress=lambda i, g, _: visits.append((i, g))
        )
    uses = {g: len({name for name, _ in spec.uses(g)}) for _, g in visits}
    assert max(uses.values()) > 2 * min(uses.values())
    n = len(uses)
    runs = [[uses[g] for _, g in visits[k : k + n]] for k in range(0, len(visits), n)]
    assert len(runs) == 8 and all(run == sorted(run, reverse=True) for run in runs[::2])
    assert any(run != sorted(run, reverse=True) for run in runs[1::2])


def test_an_aligned_model_is_a_lazy_checkpoint_that_computes_the_same(tmp_path: Path) -> None:
    a, b = made("resnet"), KINDS["resnet"].make().double().eval()
    aligned = weft.align(b, to=a, example_inputs=IMAGE)
    assert isinstance(aligned, weft.Checkpoint)
    again = weft.materialize(aligned, made("resnet"))
    torch.testing.assert_close(again(IMAGE), b(IMAGE), rtol=1e-9, atol=1e-9)
    weft.save(weft.merge([a, aligned], "linear"), tmp_path / "out")
    merged = weft.load(tmp_path / "out")
    name = "blocks.2.conv2.weight"
    expected = (a.state_dict()[name] + aligned.tensor(name)) / 2
    torch.testing.assert_close(merged.tensor(name), expected, rtol=1e-6, atol=1e-6)


def test_what_no_permutation_relates_is_refused() -> None:
    a = mlp()
    spec = discover(a)
    with pytest.raises(DataProblems, match="shapes differ; permutations need equal widths") as told:
        weft.align(mlp((6, 9, 8, 3)), to=a)
    assert told.value.problems[0].startswith("0.weight: [8, 6] in")
    broken = {n: t.clone() for n, t in a.state_dict().items()}
    broken["2.weight"][3, 4] = float("nan")
    with pytest.raises(DataError, match=r"2.weight of .* has 1 values that are NaN or infinite"):
        weight_matching(spec, a, broken)
    with pytest.raises(UsageError, match="no way to align called 'weight'; did you mean 'weights'"):
        weft.align(a, to=a, how="weight")
    with pytest.raises(UsageError, match="no config that says which network it is: give module= or spec="):
        weft.align(dict(a.state_dict()), to=dict(a.state_dict()))
    with pytest.raises(UsageError, match="tries and sweeps"):
        weight_matching(spec, a, a, tries=0)


def test_a_matcher_may_be_any_function(tmp_path: Path) -> None:
    a = mlp()
    spec = discover(a)
    spec.save(tmp_path / "spec.json")

    def turned(spec: PermutationSpec, a: weft.Checkpoint, b: weft.Checkpoint, by: int) -> dict[str, Tensor]:
        return {n: p.roll(by) for n, p in spec.identity().items()}

    aligned = weft.align(a, to=dict(a.state_dict()), how=turned, spec=tmp_path / "spec.json", by=2)
    assert torch.equal(aligned.tensor("0.bias"), a.state_dict()["0.bias"].roll(2))
