"""Partitions and constraints: which coefficient an entry takes, and what values it may have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import UsageError
from weft.learn.constraints import Affine, Box, Scaled, Simplex, Span, as_constraint
from weft.learn.parts import Blocks, as_table, layer_of, place_of, table_shapes

SHAPES = st.sampled_from([(5,), (4, 3), (2, 3, 2), (1, 4)])


@pytest.mark.parametrize(
    ("parts", "shape", "expected"),
    [
        ("model", (4, 3), ()), ("layer", (4, 3), ()), ("tensor", (4, 3), ()), ("row", (4, 3), (4, 1)),
        ("row", (4,), (4,)), ("column", (4, 3), (1, 3)), ("column", (4, 3, 2), (1, 3, 1)), ("column", (4,), ()),
        ("element", (4, 3), (4, 3)), (Blocks(5), (4, 3), (5,)), (Blocks(5), (4,), ()),
    ],
)  # fmt: skip
def test_a_partition_gives_coefficients_of_this_shape(parts: object, shape: object, expected: object) -> None:
    assert place_of("layers.1.weight", shape, parts).shape == expected  # type: ignore[arg-type]


@settings(deadline=None)
@given(SHAPES, st.sampled_from(["model", "row", "column", "element", Blocks(3)]), st.integers(0, 99))
def test_gathering_is_the_adjoint_of_spreading(shape: tuple[int, ...], parts: object, seed: int) -> None:
    place = place_of("w", shape, parts)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(place.shape, generator=g, dtype=torch.float64)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    left = (place.spread(c).expand(shape) * x).sum()
    torch.testing.assert_close(left, (c * place.gathered(x)).sum())


def test_blocks_are_random_even_and_the_same_for_a_seed() -> None:
    place = place_of("w", (300, 200), Blocks(4, seed=1))
    counts = torch.bincount(place.index.flatten(), minlength=4)  # type: ignore[union-attr]
    assert counts.sum() == 60000 and int(counts.min()) > 14500
    assert torch.equal(place.index, place_of("w", (300, 200), Blocks(4, seed=1)).index)  # type: ignore[arg-type]
    assert not torch.equal(place.index, place_of("w", (300, 200), Blocks(4, seed=2)).index)  # type: ignore[arg-type]


def test_layers_are_blocks_and_modules_outside_them() -> None:
    assert layer_of("model.layers.3.mlp.up_proj.weight") == "model.layers.3"
    assert layer_of("model.norm.weight") == "model.norm"
    assert layer_of("scale") == "scale"


def test_bad_partitions_are_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'tensor'"):
        place_of("w", (2,), "tensors")
    with pytest.raises(UsageError, match="1 block or more"):
        place_of("w", (2,), Blocks(0))
    with pytest.raises(UsageError, match="must be finite"):
        as_table(float("nan"), (3,), torch.float32)
    with pytest.raises(UsageError, match=r"\[3, 3\] do not fill a table of \[2, 2, 3\]"):
        as_table(torch.zeros(3, 3), (2, 2, 3), torch.float32)
    with pytest.raises(UsageError, match="2 coefficients to start from for 3 models"):
        as_table([0.1, 0.2], (3,), torch.float32)
    rows = [place_of("a", (2, 3), "row"), place_of("a", (4, 3), "row")]
    with pytest.raises(UsageError, match="differ in shape"):
        table_shapes(rows, 2)


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(0, 99))
def test_constraints_hold_and_start_where_they_are_told(k: int, seed: int) -> None:
    start = torch.rand(k, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.5 + 0.2
    shares = start / start.sum(0)
    for constraint in (Simplex(), Simplex(0.1), Affine()):
        torch.testing.assert_close(constraint("w", constraint.start("w", shares)), shares)
        moved = constraint("w", constraint.start("w", shares) + start)
        torch.testing.assert_close(moved.sum(0), torch.ones(2, dtype=torch.float64))
    phi = start * 4 - 1.5
    Box(-0.5, 1.0).project(phi)
    assert float(phi.min()) >= -0.5 and float(phi.max()) <= 1.0


def test_a_span_is_orthonormal_and_leaves_out_what_depends() -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(4, 50, generator=g, dtype=torch.float64)
    w = torch.cat([w, w[:1] * 2 - w[1:2]])  # the last depends on the first two
    span = Span.of(w @ w.T)
    basis = span.basis.T @ w
    assert basis.shape == (4, 50)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64))
    start = torch.full((5,), 0.2, dtype=torch.float64)
    phi = span.start("all", start)
    torch.testing.assert_close(phi @ basis, start @ w)  # its coordinates
    torch.testing.assert_close(span("all", phi) @ w, start @ w)
    with pytest.raises(UsageError, match="all zero"):
        Span.of(torch.zeros(2, 2))
    with pytest.raises(UsageError, match="parts='model'"):
        span.start("w", torch.zeros(5, 3))


def test_scaled_steps_have_one_length_and_nothing_moves_along_zero() -> None:
    scaled = Scaled({"w": torch.tensor([2.0, 0.0, 0.5])})
    made = scaled("w", torch.ones(3))
    assert made.tolist() == [0.5, 0.0, 2.0]


def test_bad_constraints_are_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'simplex'"):
        as_constraint("simplx")
    with pytest.raises(UsageError, match="low < high"):
        Box(1.0, 1.0)
    with pytest.raises(UsageError, match="start outside"):
        Box().start("w", torch.tensor([1.5]))
    with pytest.raises(UsageError, match="temperature must be above 0"):
        Simplex(0.0)
    with pytest.raises(UsageError, match="above 0"):
        Simplex().start("w", torch.tensor([0.0, 1.0]))
