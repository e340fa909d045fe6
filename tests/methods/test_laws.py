"""Laws that methods must keep, for every method in the registry: a new one is tested by being registered."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import made_up

from weft.errors import UsageError
from weft.methods.registry import METHODS, Method
from weft.methods.step import At

NEEDS = {"tall_masks": {"task": 0}, "tsv_c": {"task": 0}, "nearswap": {"t": 0.3}}
"""Parameters without a default."""
RANDOM = {"dare", "dare_ties", "della", "della_linear"}
SYMMETRIC = {"linear", "task_arithmetic", "ties", "magnitude", "breadcrumbs", "breadcrumbs_ties", "karcher",
             "multislerp", "nuslerp", "model_stock", "consensus", "emr", "pcb", "lines", "sce", "varm", "ram",
             "ram_plus", "magmax", "fisher", "fisher_nodes", "ubgm", "mats", "aim", "tsv",
             "iso_c", "iso_cts", "dc_merge", "star", "cart", "knots", "core_space", "esm", "svc",
             "subspace_boosting", "regmean", "lot", "wudi", "swudi", "swudi_a", "actmat", "gram",
             "ace", "weave", "cat"}  # fmt: skip
SPECTRAL = {"tsv", "tsv_c", "iso_c", "iso_cts", "dc_merge", "star", "knots", "core_space", "esm",
            "subspace_boosting", "swudi", "swudi_a", "wudi", "ace", "weave", "cat"}  # fmt: skip
"""Methods that change singular values and keep directions, not signs of entries; see test_spectral.py."""
NO_NEGATIVE_WEIGHTS = {"regmean", "lot", "wudi", "swudi", "swudi_a", "actmat", "gram", "ace", "weave"}
"""Least squares, which have no least with a negative weight."""
# an absolute size in the formula
NOT_HOMOGENEOUS = {"ram": {"epsilon": 0.0}, "ram_plus": {"epsilon": 0.0}, "nearswap": None,
                   "arcee_fusion": {"importance": "magnitude"}, "wudi": None,
                   "ace": {"epsilon": 0.0, "limit": 1e9}}  # fmt: skip
SMOOTH = {"linear", "task_arithmetic", "expo", "wise_ft", "passthrough", "slerp", "nuslerp", "karcher",
          "multislerp", "model_stock", "lines", "fisher", "fisher_nodes", "ubgm", "mats",
          "aim", "regmean", "lot"}  # fmt: skip
AT = At(name="layers.1.w", seed=7, layer=1, layers=3)


def stack_for(m: Method, shape=(4, 20), k: int = 3, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    low, high = m.models
    k = max(low, min(k, high or k))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(k, *shape, generator=g, dtype=torch.float64)
    common = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x + 0.5 * common).float().to(dtype)  # values that float32 holds


def call(m: Method, x, base=None, flipped=False, **params):
    stack = x if isinstance(x, torch.Tensor) else torch.stack(list(x))
    known = made_up(m.needs, stack)
    if flipped:  # the models' statistics go with them
        own = {n.source for n in m.needs if not n.of_base}
        known = {s: v.flip(0) if s in own and v is not None else v for s, v in known.items()}
    return m(x, base=base, at=AT, statistics=known, **NEEDS.get(m.name, {}), **params)


SHAPES = [(), (1,), (7,), (0,), (0, 5), (5, 0), (1, 1), (5, 1), (3, 4, 20), (2, 3, 3, 3)]
RETURNS_ONE = {
    "linear",
    "task_arithmetic",
    "karcher",
    "multislerp",
    "emr",
    "tall_masks",
    "passthrough",
    "sce",
    "varm",
    "fisher",
    "fisher_nodes",
    "ubgm",
}
methods = pytest.mark.parametrize("m", METHODS.values(), ids=list(METHODS))


@methods
def test_declaration(m):
    assert len(m.summary) > 10
    assert m.__doc__ and m.build_fn.__module__.startswith("weft.methods.")
    for alias in m.aliases:
        assert METHODS[alias] is m and alias in METHODS and alias not in set(METHODS)
    for values in m.compat.values():
        changed = m.check({**NEEDS.get(m.name, {}), **values})
        assert changed != m.check(NEEDS.get(m.name, {}))
    head = inspect.getmodule(m.build_fn).__doc__
    assert head and len(head.splitlines()) >= 5


@methods
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(m, shape):
    x = stack_for(m, shape)
    y = call(m, x)
    assert y.shape == shape and y.dtype == x.dtype and bool(y.isfinite().all())


@methods
def test_any_dtype_and_no_mutation(m):
    for dtype, out in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                       (torch.float32, torch.float32), (torch.float64, torch.float64)):  # fmt: skip
        x = stack_for(m, dtype=dtype)
        before = x.clone()
        y = call(m, x)
        assert y.dtype == out
        assert torch.equal(x, before)
        exact = call(m, x.double())
        if m.name not in RANDOM:
            torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-4)
        y.zero_()  # the result is nobody's memory
        assert torch.equal(x, before)


@methods
def test_non_contiguous(m):
    x = stack_for(m, (20, 18))
    view = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not view.is_contiguous()
    assert torch.equal(call(m, view), call(m, x))


@methods
def test_list_or_stack(m):
    x = stack_for(m)
    assert torch.equal(call(m, list(x)), call(m, x))


@methods
def test_zero_vectors(m):
    """Models that are all equal to the base give the base."""
    zero = torch.zeros_like(stack_for(m))
    assert torch.equal(call(m, zero), zero[0])
    if m.base != "forbidden":
        base = torch.randn_like(zero[0])
        assert torch.equal(call(m, base.expand_as(zero), base=base), base)


@methods
def test_identical_models(m):
    """k copies: a mean gives the model itself, a sum k times it; nothing but a scalar of each entry."""
    one = stack_for(m)[0]
    x = one.expand(len(stack_for(m)), *one.shape)
    y = call(m, x)
    if m.name in {
        "linear",
        "slerp",
        "nuslerp",
        "karcher",
        "multislerp",
        "model_stock",
        "ram",
        "sce",
        "varm",
        "fisher",
        "fisher_nodes",
    }:
        torch.testing.assert_close(y, one, rtol=1e-12, atol=1e-12)
    if m.name not in RANDOM | SPECTRAL:
        ratio = y / one
        assert bool(((y == 0) | (ratio > 0)).all())


@methods
def test_permuted_models(m):
    if m.name not in SYMMETRIC:
        pytest.skip("models have roles")
    x = stack_for(m)
    torch.testing.assert_close(call(m, x.flip(0), flipped=True), call(m, x), rtol=1e-9, atol=1e-12)
    if "weight" in m.params:
        w = [1.0, 2.0, 0.5][: len(x)]
        torch.testing.assert_close(
            call(m, x.flip(0), flipped=True, weight=w[::-1]), call(m, x, weight=w), rtol=1e-9, atol=1e-12
        )


@methods
@settings(max_examples=15, deadline=None)
@given(power=st.integers(-40, 40), seed=st.integers(0, 99))
def test_scaling(m, power, seed):
    """f(c τ) = c f(τ) for powers of two (float32 comparisons are exact then), tiny ones included."""
    params = NOT_HOMOGENEOUS.get(m.name, {})
    if params is None:
        return
    x, c = stack_for(m, seed=seed), 2.0**power
    torch.testing.assert_close(call(m, x * c, **params), call(m, x, **params) * c, rtol=1e-9, atol=0)


@methods
def test_one_model(m):
    x = stack_for(m, k=1)
    if m.models[0] > 1:
        with pytest.raises(UsageError, match=r"merges .* models?, got 1"):
            call(m, x[:1])
        return
    y = call(m, x)
    if m.name in RETURNS_ONE:
        torch.testing.assert_close(y, x[0])
    if m.models[1] is not None:
        with pytest.raises(UsageError, match="merges"):
            call(m, torch.cat([x, x, x]))


@methods
def test_base_is_added_back(m):
    x = stack_for(m)
    base = torch.randn(x.shape[1:], dtype=x.dtype).float().double()
    if m.base == "forbidden":
        with pytest.raises(UsageError, match="takes no base"):
            call(m, x, base=base)
        return
    if m.name != "arcee_fusion":
        got, alone = call(m, x + base, base=base), call(m, (x + base) - base)
        torch.testing.assert_close(got, base + alone, rtol=1e-12, atol=1e-12)


@methods
def test_weights_of_any_sign(m):
    if "weight" not in m.params:
        pytest.skip("no weights")
    x = stack_for(m)
    k = len(x)
    signs = ([-1.0, 2.0, 0.5][:k], [-1.0] * k, [0.0, 1.0, 0.0][:k])
    if m.name in NO_NEGATIVE_WEIGHTS:
        with pytest.raises(UsageError, match="weight must be float >= 0"):
            call(m, x, weight=signs[0])
        signs = signs[2:]
    for w in signs:
        assert bool(call(m, x, weight=w).isfinite().all())
    with pytest.raises(UsageError, match="weight has 1 values"):
        call(m, x, weight=[1.0])
    zero_sum = [1.0, -1.0, 0.0][:k]
    for w in (zero_sum, [0.0] * k) if m.name not in NO_NEGATIVE_WEIGHTS else ([0.0] * k,):
        try:
            assert bool(call(m, x, weight=w).isfinite().all())
        except UsageError as e:
            assert "sum to zero" in str(e)


DEGENERATE = {
    "parallel": lambda x: torch.stack([x[0] * (i + 1) for i in range(len(x))]),
    "antiparallel": lambda x: torch.stack([x[0] * (-1) ** i for i in range(len(x))]),
    "nearly antiparallel": lambda x: torch.stack([x[0] * (-1) ** i + 1e-5 * x[i] for i in range(len(x))]),
    "nearly equal": lambda x: torch.stack([x[0] + 1e-9 * t for t in x]),
    "one zero": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "last zero": lambda x: torch.cat([x[:-1], torch.zeros_like(x[:1])]),
    "zero rows": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1),
    "one magnitude": lambda x: x.sign(),
    "sparse": lambda x: torch.where(x.abs() > 1, x, 0.0),
    "tiny": lambda x: x * 1e-30,
    "large": lambda x: x * 1e15,
}


@methods
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_degenerate_inputs_are_finite(m, kind, dtype):
    x = DEGENERATE[kind](stack_for(m)).to(dtype)
    variants = [{}] + ([{"row_wise": True}] if "row_wise" in m.params else [])
    for params in variants:
        y = call(m, x, **params)
        assert bool(y.isfinite().all())
        far = kind == "nearly antiparallel" or (
            kind == "tiny" and m.name == "wudi"
        )  # whose steps are absolute
        assert y.abs().max() <= 30 * x.abs().max() + 1e-30 or far


@methods
@pytest.mark.parametrize("kind", ["random", "identical", "antiparallel", "one zero"])
def test_gradients_flow(m, kind):
    x = stack_for(m)
    if kind == "identical":
        x = x[:1].expand_as(x)
    elif kind != "random":
        x = DEGENERATE[kind](x)
    x = x.clone().requires_grad_()
    params = {"density": 0.9} if "density" in m.params else {}
    y = call(m, x, **params)
    assert y.requires_grad
    y.square().sum().backward()
    assert bool(x.grad.isfinite().all())
    if kind == "random":
        assert float(x.grad.abs().max()) > 0


@methods
def test_gradcheck(m):
    if m.name not in SMOOTH:
        pytest.skip("piecewise: masks are constants of the gradient")
    for params in [{}] + ([{"row_wise": True}] if "row_wise" in m.params else []):
        if m.name == "karcher":  # as far as it goes: a fixed number of steps
            params = {**params, "max_iter": 4, "tol": 0.0}
        x = stack_for(m, (2, 16)).requires_grad_()
        assert torch.autograd.gradcheck(lambda t, p=params: call(m, t, **p), x, atol=1e-6)


def test_every_method_is_classified():
    """A new method says which laws it keeps."""
    listed = SYMMETRIC | RANDOM | SPECTRAL | {"slerp", "expo", "wise_ft", "passthrough", "tall_masks", "nearswap",
                                   "arcee_fusion"}  # fmt: skip
    assert set(METHODS) == listed


# -- single parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in METHODS if "tie" in METHODS[n].params])
def test_tie(name):
    """Masses that cancel elect nobody, or plus."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 3.0]], dtype=torch.float64)
    params = {p: v for p, v in {"density": 1.0, "scale": 1.0, "gamma": 0.0, "of": "ties",
                                "min_tasks": 1}.items() if p in METHODS[name].params}  # fmt: skip
    none = METHODS[name](x, tie="none", **params)
    plus = METHODS[name](x, tie="plus", **params)
    assert none[0] == 0 and plus[0] == 1 and none[1] == plus[1]


def test_select_of():
    x = torch.tensor([[1.0, 2.0, 5.0, 0.0, 0.0, 0.0], [1.0, 3.0, 9.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    every = METHODS["sce"](x, select_topk=0.5)  # 3 of 6: all that vary, and all that tie with variance 0
    some = METHODS["sce"](x, select_topk=0.5, select_of="nonzero")  # 1 of 2
    assert (every != 0).tolist() == [True, True, True, False, False, False]
    assert (some != 0).tolist() == [False, False, True, False, False, False]


def test_karcher_of_nearly_antipodal_directions_is_the_midpoint():
    g = torch.Generator().manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(50, 2, generator=g, dtype=torch.float64))[0].T
    for gap in (1e-1, 1e-3, 1e-5):
        half = (torch.pi - gap) / 2
        h = torch.tensor(half, dtype=torch.float64)
        a, b = h.cos() * u + h.sin() * v, h.cos() * u - h.sin() * v
        for name in ("karcher", "slerp", "nuslerp"):
            torch.testing.assert_close(METHODS[name]([a, b]), u, rtol=0, atol=1e-9 / gap)
        w = METHODS["karcher"]([a, b], weight=[3.0, 1.0])
        s = METHODS["slerp"]([a, b], t=0.25)
        torch.testing.assert_close(w, s, rtol=0, atol=1e-8 / gap)


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_cancelling_directions_give_the_linear_mean(name):
    x = torch.randn(10, dtype=torch.float64)
    torch.testing.assert_close(METHODS[name]([x, -3 * x]), -x)
    torch.testing.assert_close(METHODS["slerp"]([x, -3 * x], t=0.25), torch.zeros_like(x), atol=1e-12, rtol=0)


def test_slerp_keeps_norms_and_ends():
    a, b = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double()
    torch.testing.assert_close(METHODS["slerp"]([a, b]).norm(), a.norm())
    torch.testing.assert_close(METHODS["slerp"]([a, b], t=0.0), a)
    torch.testing.assert_close(METHODS["slerp"]([a, b], t=1.0), b)


def test_laws_of_papers():
    x = stack_for(METHODS["ties"])
    m = METHODS
    torch.testing.assert_close(m["dare"](x, density=1.0), x.sum(0))
    torch.testing.assert_close(m["consensus"](x, min_tasks=0, scale=1.0), x.sum(0))
    assert not m["consensus"](x, min_tasks=4).any()
    torch.testing.assert_close(m["expo"](x[:1], alpha=0.5), 1.5 * x[0])
    orthogonal = torch.eye(3).double()
    assert not m["model_stock"](orthogonal).any()
    # tasks on disjoint supports: the mask finds each task again
    parts = torch.block_diag(*[torch.randn(1, 4).double() for _ in range(3)])
    for t in range(3):
        torch.testing.assert_close(m["tall_masks"](parts, task=t), parts[t])
        torch.testing.assert_close(m["emr"](parts, task=t), parts[t])
    torch.testing.assert_close(m["ram"](parts), parts.sum(0))
    # the later of equal changes
    assert m["magmax"](torch.tensor([[1.0, -2.0], [-1.0, 2.0]]), scale=1.0).tolist() == [-1.0, 2.0]


def test_depth():
    def factor(layer, layers):
        return float(METHODS["lines"]([torch.ones(1)], alpha=0.2, beta=0.6,
                                      at=At(layer=layer, layers=layers)))  # fmt: skip

    assert [factor(i, 4) for i in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factor(None, 4) == factor(0, 1) == pytest.approx(0.2)
    from weft.methods.lines import scale_by_depth

    x = torch.randn(2, 3)
    got = scale_by_depth(x, at=At(layer=3, layers=4), alpha=0.2, beta=0.6)
    torch.testing.assert_close(got, 0.8 * x)


@pytest.mark.parametrize("name", ["tall_masks", "emr"])
def test_no_such_task(name):
    with pytest.raises(UsageError, match="there is no task 3: the 3 models are tasks 0 to 2"):
        METHODS[name](torch.ones(3, 4), task=3)
    assert METHODS[name].per_task
