"""Sums, negations and analogies of adapters: laws, and what peft computes with what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging_models import NAMES, Net, config, delta, random_factors, saved, with_adapters, write

pytest.importorskip("peft")

from peft import IA3Config, PeftModel
from torch import Tensor

import weft
from weft.adapters.arithmetic import Combined, combined_ia3, transferred
from weft.adapters.factors import Adapter, as_adapter
from weft.adapters.lowrank import difference
from weft.errors import DataError, UsageError

SHAPES = {"layers.0.q.weight": (20, 16)}
Q0 = "layers.0.q.weight"


@pytest.fixture
def abc(tmp_path: Path) -> list[Adapter]:
    return [as_adapter(write(tmp_path / str(i), random_factors(SHAPES, 2 + i, i))) for i in range(3)]


def dense(adapter: Adapter) -> Tensor:
    return adapter.factors(Q0).delta()


def test_sums_are_exact_and_flat(abc: list[Adapter]) -> None:
    a, b, c = abc
    made = a + 0.5 * (b - c) - a * 0.25
    assert isinstance(made, Combined) and [t[0] for t in made.terms] == [0.75, 0.5, -0.5]
    torch.testing.assert_close(dense(made), 0.75 * dense(a) + 0.5 * dense(b) - 0.5 * dense(c))
    assert made.rank(Q0) == 2 + 3 + 4


def test_negation_negates_one_factor_only(abc: list[Adapter]) -> None:
    """Negating A and B both would change nothing."""
    a = abc[0]
    torch.testing.assert_close(dense(-a), -dense(a))
    torch.testing.assert_close((-a).factors(Q0).a, a.factors(Q0).a)
    torch.testing.assert_close(dense((-a) * -1.0), dense(a))
    assert float((a - a).factors(Q0).delta().abs().max()) == 0.0
    both = -a.factors(Q0).b @ -a.factors(Q0).a
    torch.testing.assert_close(both, dense(a))


def test_what_is_written_is_the_sum(abc: list[Adapter], tmp_path: Path) -> None:
    made = abc[0] - 2.0 * abc[1]
    assert isinstance(made, Combined)
    weft.save(made.checkpoint, tmp_path / "out")
    assert difference(as_adapter(tmp_path / "out").factors(Q0), made.factors(Q0)) < 1e-6
    with pytest.raises(UsageError, match="only adapters"):
        abc[0] + 1.0  # type: ignore[operator]


def test_a_transfer_of_lora_is_the_analogy(abc: list[Adapter]) -> None:
    a, b, c = abc
    made = as_adapter(transferred(a, b, c, 0.5))
    torch.testing.assert_close(dense(made), dense(a) + 0.5 * (dense(b) - dense(c)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dense(as_adapter(transferred(a, b, b))), dense(a), atol=1e-6, rtol=1e-6)


# -- (IA)³ ------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(tmp_path: Path) -> tuple[PeftModel, list[Adapter]]:
    settings = {
        n: IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]) for n in ("a", "b", "c")
    }
    model = with_adapters(settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_" in name:
                parameter.add_(1.0)  # near the vector that changes nothing
    return model, [as_adapter(p) for p in saved(model, tmp_path / "in").values()]


def vectors(adapter: Adapter) -> dict[str, Tensor]:
    return {n: adapter.scaling(n).flatten() for n in adapter.scalings}


def test_ia3_adds_around_one(scaled: tuple[PeftModel, list[Adapter]]) -> None:
    a, b, c = scaled[1]
    assert set(a.scalings) == set(NAMES)
    for n in NAMES:
        x, y, z = (vectors(v)[n] for v in (a, b, c))
        torch.testing.assert_close(vectors(-a)[n], 2 - x)
        torch.testing.assert_close(vectors((-a) * -1.0)[n], x)
        torch.testing.assert_close(vectors(0.5 * a + 0.5 * b)[n], (x + y) / 2)
        torch.testing.assert_close(vectors(a + b - c)[n], x + y - z)
        torch.testing.assert_close(vectors(a * 0.0)[n], torch.ones_like(x))
        moved = as_adapter(transferred(a, b, c, 0.5))
        torch.testing.assert_close(vectors(moved)[n], x * (0.5 * (y / z - 1) + 1))
        torch.testing.assert_close(vectors(as_adapter(transferred(a, b, b)))[n], x)


def test_peft_loads_a_combined_ia3_adapter(scaled: tuple[PeftModel, list[Adapter]], tmp_path: Path) -> None:
    made = scaled[1][0] * 0.5 - scaled[1][1]
    assert isinstance(made, Combined)
    weft.save(made.checkpoint, tmp_path / "out")
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path / "out"))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    up, down = (vectors(made)[n].float() for n in NAMES)
    block = Net().block
    expected = block.down(
        torch.tanh(block.up(x) * up) * down
    )  # feed-forward layers scale what they are given
    torch.testing.assert_close(loaded(x), expected, atol=1e-5, rtol=1e-5)


def test_kinds_do_not_mix(
    scaled: tuple[PeftModel, list[Adapter]], abc: list[Adapter], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"\(IA\)³"):
        abc[0] + scaled[1][0]
    other = with_adapters({"x": IA3Config(target_modules=["up"], feedforward_modules=[])})
    small = as_adapter(saved(other, tmp_path / "other")["x"])
    with pytest.raises(DataError, match=r"down.*not in"):
        combined_ia3([scaled[1][0], small], [0.5, 0.5])
    with pytest.raises(UsageError, match="1 weights for 2"):
        combined_ia3(scaled[1][:2], [1.0])


def test_peft_agrees_that_a_sum_is_a_sum(tmp_path: Path) -> None:
    model = with_adapters({"a": config(4, 8), "b": config(2, 8)})
    a, b = (as_adapter(p) for p in saved(model, tmp_path).values())
    for name in NAMES:
        expected = delta(model, "a", name) - 0.5 * delta(model, "b", name)
        torch.testing.assert_close((a - 0.5 * b).factors(name).delta(), expected, atol=1e-5, rtol=1e-5)
