"""Parameters: types, bounds, one value a model, and errors that say what is meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pytest
import torch

from weft.errors import UsageError
from weft.methods.params import (
    Bounds,
    Density,
    Fraction,
    Positive,
    Weight,
    check_params,
    per_model,
    signature_parameters,
)
from weft.methods.registry import METHODS, method, pipeline_method
from weft.methods.step import STEPS, Pipeline, step
from weft.methods.ties import disjoint_mean, elect_sign, trim


def example(
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    t: Fraction,
    size: Positive = 1.0,
    count: Annotated[int, Bounds(0)] = 3,
    way: Literal["a", "b"] = "a",
    on: bool = False,
    alpha: float | None = None,
    task: Annotated[int, Bounds(0)] | None = None,
) -> None: ...


DECLARED = signature_parameters(example)


def check(**given):
    return check_params("example", DECLARED, {"t": 0.5, **given})


@pytest.mark.parametrize("given", [
    {"weight": -2}, {"weight": [1, -1.5]}, {"weight": (1, 2)}, {"density": [0, 1.0]}, {"t": 1}, {"t": "1e-5"},
    {"size": 1e-9}, {"count": 2.0}, {"way": "b"}, {"on": True}, {"alpha": None}, {"alpha": -1},
    {"task": None}, {"task": 2},
])  # fmt: skip
def test_accepted(given):
    got = check(**given)
    for name, value in given.items():
        if value is not None:
            first = got[name][0] if isinstance(got[name], list) else got[name]
            assert type(first) is {"int": int, "float": float, "bool": bool}.get(DECLARED[name].kind, str)


@pytest.mark.parametrize("given, words", [
    ({"densty": 1}, "example has no parameter 'densty'; did you mean 'density'?"),
    ({"zzz": 1}, "no parameter 'zzz'; it has weight, density"),
    ({"density": 1.7}, r"density must be float in \[0, 1\], one a model, not 1.7 \(example\)"),
    ({"density": [0.5, -0.1]}, r"in \[0, 1\], one a model, not -0.1"),
    ({"t": [0.5]}, "t must be"), ({"t": True}, "t must be"), ({"t": None}, "t must be"),
    ({"t": "x"}, "t must be"),
    ({"t": float("nan")}, "t must be"), ({"weight": float("inf")}, "weight must be"),
    ({"size": 0}, "size must be float > 0, not 0"), ({"count": 1.5}, "count must be int >= 0, not 1.5"),
    ({"count": -1}, "count must be"), ({"way": "c"}, "way must be 'a' | 'b', not 'c'"),
    ({"way": 1}, "way must be"),
    ({"on": 1}, "on must be bool, not 1"), ({"alpha": "x"}, "alpha must be"), ({"task": -1}, "task must be"),
])  # fmt: skip
def test_refused(given, words):
    with pytest.raises(UsageError, match=words.replace("|", r"\|") if " | " in words else words):
        check(**given)


def test_required():
    with pytest.raises(UsageError, match=r"example needs t \(float in \[0, 1\]\)"):
        check_params("example", DECLARED, {})
    assert DECLARED["t"].required and not DECLARED["alpha"].required


def test_per_model():
    assert per_model(2, 3) == [2.0, 2.0, 2.0]
    assert per_model((1, 2), 2) == [1.0, 2.0]
    with pytest.raises(UsageError, match="density has 2 values for 3 models"):
        per_model([1, 2], 3, "density")


def test_annotations_weft_cannot_read():
    def odd(*, x: Sequence[str]) -> None: ...

    with pytest.raises(TypeError, match="parameter x: annotation"):
        signature_parameters(odd)


@pytest.mark.parametrize("name", METHODS)
def test_every_bound_is_enforced(name):
    for p in METHODS[name].params.values():
        low, high = p.bounds.low, p.bounds.high
        for value in (low - 1, high + 1):
            if abs(value) < float("inf"):
                with pytest.raises(UsageError, match=f"{p.name} must be"):
                    p.check(value)
        if p.choices:
            with pytest.raises(UsageError, match=f"{p.name} must be"):
                p.check("no such choice")
        if not p.required:
            assert p.check(p.default) == p.default


def test_unknown_method():
    with pytest.raises(UsageError, match="there is no method 'tise'; did you mean 'ties'"):
        METHODS["tise"]
    with pytest.raises(UsageError, match="there is no method 'dare_liner'; did you mean 'dare_linear'"):
        METHODS["dare_liner"]


def test_names_are_taken_once():
    def make(name, **kw):
        def build() -> Pipeline: ...

        build.__name__ = name
        return method(space="deltas", paper="", **kw)(build)

    for name, kw in (("ties", {}), ("dare_linear", {}), ("brand_new", {"aliases": ("ties",)})):
        with pytest.raises(UsageError, match="there are two methods named"):
            make(name, **kw)
    assert "brand_new" not in METHODS


def test_steps_compose_to_the_method():
    x = torch.randn(3, 4, 20)
    steps = trim(density=0.3) | elect_sign(weight=2.0) | disjoint_mean(weight=2.0)
    assert torch.equal(steps(x), METHODS["ties"](x, density=0.3, weight=2.0))
    assert torch.equal(pipeline_method(steps)(x), steps(x))
    assert str(steps).startswith("trim(density=0.3, scope='tensor') | elect_sign(weight=2.0")
    assert torch.equal(trim(x, density=0.3), trim(density=0.3)(x))


def test_a_step_after_the_merge_cannot_need_the_stack():
    with pytest.raises(UsageError, match="step trim needs the stack, which is merged before it"):
        (disjoint_mean() | trim())(torch.randn(2, 3))


def test_steps_have_documented_parameters():
    for name, s in STEPS.items():
        assert s.__doc__, name
        assert not {"at", "base"} & set(s.params)
        assert not (s.stat and set(s.stat.provides) & set(s.params))


def test_tensors_of_different_shapes():
    with pytest.raises(UsageError, match="must have one shape"):
        METHODS["linear"]([torch.ones(2), torch.ones(3)])
    with pytest.raises(UsageError, match="got a scalar"):
        METHODS["linear"](torch.tensor(1.0))


def test_a_users_own_step():
    @step()
    def test_only_sign(x, *, size: float = 1.0):
        """Signs."""
        return x.sign() * size

    try:
        x = torch.randn(2, 5)
        assert torch.equal((test_only_sign(size=2.0) | disjoint_mean())(x), disjoint_mean(2 * x.sign()))
        with pytest.raises(UsageError, match="there are two steps named 'test_only_sign'"):
            step()(test_only_sign.fn)
    finally:
        del STEPS["test_only_sign"]


def test_a_registry_is_asked_as_any_mapping() -> None:
    assert METHODS.get("ties") is METHODS["ties"]
    assert METHODS.get("no such method") is None and METHODS.get("no such method", 3) == 3
