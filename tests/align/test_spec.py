"""`PermutationSpec`: by hand, printed, saved, edited, refused; permutations as a group; lazy checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import IMAGE, KINDS, made
from torch import nn

import weft
from weft.align import PermutationSpec, discover, reordered
from weft.align.terms import parsed, written
from weft.errors import DataError, DataProblems, Problems, UsageError, WeftError


def same_up_to_names(a: PermutationSpec, b: PermutationSpec) -> None:
    """Every axis of every tensor moves in the same way, whatever the groups are called."""
    assert a.axes.keys() == b.axes.keys()
    called: dict[str, str] = {}
    for name, row in a.axes.items():
        for x, y in zip(row, b.axes[name], strict=True):
            left, right = _flat(a, x), _flat(b, y)
            assert len(left) == len(right), (name, written(x), written(y))
            for p, q in zip(left, right, strict=True):
                assert called.setdefault(p, q) == q, (name, written(x), written(y))
    assert len(set(called.values())) == len(called)
    for p, q in called.items():
        if p in a.groups:
            assert a.shape(p) == b.shape(q) and {called[w] for w in a.groups[p].within} == set(
                b.groups[q].within
            )


def _flat(spec: PermutationSpec, term: Any) -> list[str]:
    text = written(term) or "1"
    for sign in "*|()":
        text = text.replace(sign, f" {sign} ")
    # a group of which nothing moves is as good as its size
    return [
        str(spec.groups[w].size) if w in spec.groups and spec.groups[w].fixed else w for w in text.split()
    ]


def test_mlp_by_hand() -> None:
    hand = PermutationSpec.of(
        {"h1": 8, "h2": 8},
        {"0.weight": ("h1", 6), "0.bias": ("h1",), "2.weight": ("h2", "h1"), "2.bias": ("h2",),
         "4.weight": (3, "h2"), "4.bias": (3,)},
    )  # fmt: skip
    same_up_to_names(discover(made("mlp"), KINDS["mlp"].inputs), hand)


def test_vgg_by_hand() -> None:
    norm = {f"1.{p}": ("c1",) for p in ("weight", "bias", "running_mean", "running_var")}
    hand = PermutationSpec.of(
        {"c1": 8, "c2": 12, "f": 20},
        {"0.weight": ("c1", 3, 3, 3), "0.bias": ("c1",), **norm, "1.num_batches_tracked": (),
         "4.weight": ("c2", "c1", 3, 3), "4.bias": ("c2",),
         # each channel of the last convolution is a run of 2 × 2 inputs of the linear layer
         "8.weight": ("f", "c2*4"), "8.bias": ("f",), "11.weight": (10, "f"), "11.bias": (10,)},
    )  # fmt: skip
    same_up_to_names(discover(made("vgg"), IMAGE), hand)


def test_resnet_by_hand() -> None:
    """A stage has one residual stream; a block that changes the width begins another."""
    axes: dict[str, tuple[Any, ...]] = {
        "conv1.weight": ("s0", 3, 3, 3),
        "fc.weight": (10, "s2"),
        "fc.bias": (10,),
    }

    def norm(name: str, group: str) -> None:
        axes.update({f"{name}.{p}": (group,) for p in ("weight", "bias", "running_mean", "running_var")})
        axes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", "s0")
    for i in range(3):
        before, stream, inside = f"s{max(i - 1, 0)}", f"s{i}", f"b{i}"
        axes[f"blocks.{i}.conv1.weight"] = (inside, before, 3, 3)
        axes[f"blocks.{i}.conv2.weight"] = (stream, inside, 3, 3)
        norm(f"blocks.{i}.bn1", inside)
        norm(f"blocks.{i}.bn2", stream)
        if i:
            axes[f"blocks.{i}.short.0.weight"] = (stream, before, 1, 1)
            norm(f"blocks.{i}.short.1", stream)
    groups = {f"{k}{i}": 8 << i for i in range(3) for k in "sb"}
    same_up_to_names(discover(made("resnet"), IMAGE), PermutationSpec.of(groups, axes))


def test_it_prints_saves_loads_and_can_be_edited(tmp_path: Path) -> None:
    spec = discover(made("encoder"), KINDS["encoder"].inputs)
    assert "within" in str(spec) and "embed.weight axis 1" in str(spec)
    path = tmp_path / "spec.json"
    spec.save(path)
    again = PermutationSpec.load(path)
    assert again == spec and again.text() == spec.text()
    data = json.loads(path.read_text())
    data["groups"]["embed"]["fixed"] = True  # the residual stream is to stay
    edited = PermutationSpec.from_json(data)
    assert edited.degrees == spec.degrees - 12 and "embed" not in edited.movable
    with pytest.raises(Problems, match="embed: its units stay where they are"):
        edited.complete({"embed": torch.arange(12).flip(0)})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]", "must hold a JSON object"),
        ('{"groups": {}}', "is no permutation specification.*'axes'"),
        ('{"groups": {"a": {"size": 0}}, "axes": {}}', "a: size 0"),
        ('{"groups": {"a": {"size": "3"}}, "axes": {}}', "no whole number"),
        ('{"groups": {"a": {"size": 3, "colour": 1}}, "axes": {}}', "colour"),
        ('{"groups": {}, "axes": {"w": ["a"]}}', "'a', which is no group"),
        ('{"groups": {"a": {"size": 3}}, "axes": {"w": ["a*"]}}', "lacks a group or a number"),
        ('{"groups": {"a": {"size": 3}}, "axes": {"w": ["(a"]}}', "lacks a closing parenthesis"),
        ('{"groups": {"a": {"size": 3}}, "axes": {"w": ["a b"]}}', "too many"),
        ('{"groups": {"d": {"size": 3, "within": ["h"]}}, "axes": {}}', "within 'h', which is no group"),
        ('{"groups": {"d": {"size": 3, "within": ["h"]}, "h": {"size": 2}}, "axes": {}}', "stands before 'h'"),
        ('{"groups": {"h": {"size": 2}, "d": {"size": 3, "within": ["h"]}}, "axes": {"w": ["d*h"]}}',
         "where no unit of h is known"),
        ('{"groups": {"k": {"size": 2}, "h": {"size": 2, "within": ["k"]}, "d": {"size": 3, "within": ["h"]}}, '
         '"axes": {}}', "so within 'k' too, which must be listed"),
    ],
)  # fmt: skip
def test_a_file_that_lies_is_refused(text: str, told: str) -> None:
    with pytest.raises(WeftError, match=told):
        PermutationSpec.from_json(text)


def test_a_file_of_another_network_is_refused_with_every_reason(tmp_path: Path) -> None:
    spec = discover(made("mlp"), KINDS["mlp"].inputs)
    wide = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(DataProblems, match=r"0.weight: shape .9, 6. does not fit") as told:
        spec.apply(wide, spec.identity())
    assert len(told.value.problems) == 3
    with pytest.raises(DataProblems, match="the specification says nothing of it"):
        spec.apply({**made("mlp").state_dict(), "extra": torch.ones(2)}, {})
    huge = PermutationSpec({**spec.groups, "x": weft.align.Group(10**15)}, spec.axes)
    with pytest.raises(DataProblems, match="x: a group that stands along no axis"):
        weft.align(made("mlp"), to=made("mlp"), spec=huge)  # refused before so many units are laid out
    with pytest.raises(DataError, match="No such file"):
        PermutationSpec.load(tmp_path / "nowhere.json")


def test_terms_are_read_as_they_are_written() -> None:
    for text in ("a", "3", "a*4", "h*(q|q|v)", "h*q|h*q|h*v", "8|a", "2*h*d"):
        assert written(parsed(text)) == text
    assert written(parsed("a*(b*c)")) == "a*b*c" and written(parsed("2*3*a|(4|5)")) == "6*a|9"


@pytest.mark.parametrize("kind", ["mlp", "resnext", "encoder"])
def test_permutations_are_a_group(kind: str) -> None:
    """(π then ρ), π⁻¹ and the identity do to tensors what their names say, within other groups too."""
    net = made(kind)
    spec = discover(net, KINDS[kind].inputs)
    state = dict(net.state_dict())
    p, q = spec.random(1), spec.random(2)
    one_by_one = reordered(reordered(state, spec, p), spec, q)
    at_once = reordered(state, spec, spec.compose(p, q))
    back = reordered(reordered(state, spec, p), spec, spec.inverse(p))
    for name in state:
        assert torch.equal(one_by_one[name], at_once[name]) and torch.equal(back[name], state[name])
    for name, values in spec.compose(p, spec.inverse(p)).items():
        assert torch.equal(values, spec.identity()[name])
    assert all(torch.equal(a, b) for a, b in zip(spec.random(1).values(), p.values(), strict=True))


def test_permutations_that_are_none_are_refused_all_at_once() -> None:
    spec = discover(made("mlp"), KINDS["mlp"].inputs)
    with pytest.raises(Problems) as told:
        spec.complete(
            {
                "layer.0": torch.zeros(8, dtype=torch.int64),
                "layer.2": torch.arange(7),
                "layer.3": torch.ones(1),
            }
        )
    assert len(told.value.problems) == 3
    assert "did you mean" in str(told.value)
    with pytest.raises(UsageError, match=r"there is no group 'layer.9'"):
        spec.group("layer.9")


@pytest.mark.parametrize("kind", ["mlp", "vgg", "resnext", "encoder"])
def test_a_permuted_checkpoint_is_lazy_and_saves_what_it_says(kind: str, tmp_path: Path) -> None:
    net = made(kind)
    spec = discover(net, KINDS[kind].inputs)
    weft.save(net, tmp_path / "net.safetensors")
    p = spec.random(3)
    lazy = spec.apply(tmp_path / "net.safetensors", p)
    expected = reordered(dict(net.state_dict()), spec, p)
    weft.save(lazy, tmp_path / "moved.safetensors", memory="64MiB")
    saved = weft.load(tmp_path / "moved.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(saved.tensor(name), tensor), name
        info = lazy.info(name)
        grain = lazy.grain(name)
        for start in range(0, info.numel, max(grain, info.numel // 3 // grain * grain)):
            stop = min(start + max(grain, info.numel // 3 // grain * grain), info.numel)
            assert torch.equal(lazy.read(name, start, stop), tensor.flatten()[start:stop])
    assert (
        lazy.identity()
        and lazy.identity() != spec.apply(tmp_path / "net.safetensors", spec.random(4)).identity()
    )


def test_large_tensors_are_read_row_by_row(tmp_path: Path) -> None:
    """More than SMALL elements: rows gathered from where they lie, never the whole tensor."""
    from weft.align.apply import SMALL

    net = nn.Sequential(nn.Linear(300, 600), nn.ReLU(), nn.Linear(600, 500))
    assert net[2].weight.numel() > SMALL  # type: ignore[operator]
    spec = discover(net)
    weft.save(net, tmp_path / "net.safetensors")
    p = spec.random(0)
    lazy = spec.apply(tmp_path / "net.safetensors", p)
    moved = reordered(dict(net.state_dict()), spec, p)
    for name in ("0.weight", "2.weight"):
        row = net.state_dict()[name].shape[1]
        assert lazy.grain(name) == row
        assert torch.equal(lazy.read(name, 7 * row, 90 * row), moved[name].flatten()[7 * row : 90 * row])
