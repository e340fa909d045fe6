"""Data to learn from: cut, shuffled by the seed, endless; everything that is wrong is said at once."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from weft.errors import DataError, Problems, UsageError
from weft.learn.data import Feed, feeds
from weft.statistics.batches import Batch

CPU = torch.device("cpu")


def some(data: object, n: int, size: int = 4, seed: int = 0) -> list[Batch]:
    return list(islice(iter(Feed(data, size, seed, CPU)), n))  # type: ignore[arg-type]


def test_tensors_are_shuffled_anew_each_pass_and_kept_together() -> None:
    x = torch.arange(10.0)[:, None]
    found = some((x, torch.arange(10)), 6)
    assert [b.size for b in found] == [4, 4, 2, 4, 4, 2]
    for b in found:
        assert torch.equal(b.args[0][:, 0].long(), b.labels)
    first, second = (torch.cat([b.labels for b in found[i : i + 3]]) for i in (0, 3))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert not torch.equal(first, second)
    again = some((x, torch.arange(10)), 6)
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(found, again, strict=True))
    assert not torch.equal(some((x, torch.arange(10)), 1, seed=1)[0].labels, found[0].labels)


def test_every_form_of_data_gives_batches() -> None:
    x, y = torch.randn(8, 2), torch.arange(8)
    named = some({"x": x, "labels": y}, 1)[0]
    assert named.kwargs["x"].shape == (4, 2) and named.labels is not None and named.args == ()
    listed = some([(x, y), (x[:3], y[:3])], 3)
    assert [b.size for b in listed] == [8, 3, 8]
    drawn = some(lambda g: torch.randn(5, 2, generator=g), 2)
    assert drawn[0].size == 5 and not torch.equal(drawn[0].args[0], drawn[1].args[0])
    assert torch.equal(drawn[0].args[0], some(lambda g: torch.randn(5, 2, generator=g), 1)[0].args[0])
    assert sum(b.size for b in Feed((x, y), 3, 0, CPU).once()) == 8


def test_data_that_cannot_be_used_say_why() -> None:
    x = torch.randn(4, 2)
    for data, message in (
        (torch.zeros(0, 2), "no examples"), ((x, torch.zeros(3)), r"different lengths: \[3, 4\]"),
    ):  # fmt: skip
        with pytest.raises((DataError, UsageError), match=message):
            some(data, 1)
    with pytest.raises(UsageError, match="batch must be 1 or more"):
        some(x, 1, size=0)
    with pytest.raises(UsageError, match="not int"):
        some(3, 1)
    with pytest.raises(DataError, match="NaN or infinite"):
        some(x * torch.nan, 1)
    with pytest.raises(DataError, match="hold no batches"):
        some([], 1)
    with pytest.raises(DataError, match="gives its batches once"):
        some(iter([x]), 2)
    spent = Feed(iter([x]), 4, 0, CPU)
    assert len(list(spent.once())) == 1
    with pytest.raises(DataError, match="gives its batches once"):
        list(spent.once())
    with pytest.raises(UsageError, match="must have an end"):
        list(Feed(lambda g: x, 4, 0, CPU).once())


def test_tasks_and_data_must_be_the_same() -> None:
    x: Tensor = torch.randn(4, 2)
    assert list(feeds(x, None, 4, 0, CPU)) == [None]
    assert list(feeds({"b": x, "a": x}, ["a", "b"], 4, 0, CPU)) == ["a", "b"]
    with pytest.raises(UsageError, match="give data by task"):
        feeds(x, ["a"], 4, 0, CPU)
    with pytest.raises(Problems) as told:
        feeds({"rotate": x, "b": torch.zeros(0, 2)}, ["rotated", "b", "c"], 4, 0, CPU)
    assert told.value.problems == [
        "'rotate': no such task; did you mean 'rotated'?", "no data of rotated, c: every task needs some",
        "b: the data hold no examples",
    ]  # fmt: skip
