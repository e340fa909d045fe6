"""The fused kernels compute what the torch definition computes, bit for bit where sums have one order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import TILE, Execution, executing
from weft.checkpoints.memory import StateDict
from weft.engine.kernels import Kernels
from weft.engine.kernels.objects import Kernel
from weft.errors import DataError
from weft.methods.merge import Merge
from weft.methods.registry import METHODS

CASES = [
    ("linear", {"weight": [0.5, 0.3, 0.2]}),
    ("linear", {"weight": [1.0, 1.0, 1.0]}),
    ("task_arithmetic", {"weight": [0.7, -0.4, 1.0], "scale": 0.6}),
    ("ties", {"density": 0.3, "scope": "tensor"}),
    ("ties", {"density": [0.1, 0.5, 0.9], "weight": [1.0, 0.5, -0.3], "elect": "count", "tie": "plus"}),
    ("ties", {"density": 1.0, "normalize": False}),
    ("dare", {"density": 0.4}),
    ("dare_ties", {"density": [0.4, 1.0, 0.0]}),
    ("dare_ties", {"density": 0.4, "rescale": "l1"}),
    ("dare", {"density": [0.4, 1.0, 0.0], "rescale": "l1"}),
    ("della", {"density": 0.5, "epsilon": 0.2}),
    ("della", {"density": [0.5, 0.3, 1.0], "epsilon": 0.2, "rescale": "l1"}),
    ("della_linear", {"density": 0.5, "epsilon": 0.2, "rescale": "none"}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.05}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.05, "scope": "model"}),
    ("magnitude", {}),
    ("karcher", {"weight": [1.0, 2.0, 3.0]}),
    ("multislerp", {}),
    ("model_stock", {}),
    ("magmax", {}),
    ("sce", {}),
    ("consensus", {}),
]


def models(dtype: torch.dtype, k: int = 3) -> tuple[StateDict, list[StateDict]]:
    g = torch.Generator().manual_seed(1)
    shapes = {
        "embed.weight": (70, 301),
        "layers.0.w": (3 * TILE // 64 + 5, 64),
        "layers.1.b": (77,),
        "scale": (),
    }
    base = {n: torch.randn(s, generator=g) * 0.02 for n, s in shapes.items()}
    tuned = [
        {n: (t + torch.randn(t.shape, generator=g) * 1e-3).to(dtype) for n, t in base.items()}
        for _ in range(k)
    ]
    return StateDict({n: t.to(dtype) for n, t in base.items()}), [StateDict(t) for t in tuned]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1, 3])
@pytest.mark.parametrize(("method", "params"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_not_finite_is_found_and_named(
    method: str, params: dict[str, object], where: int, bad: float, dtype: torch.dtype
) -> None:
    """In the base (0), or in a model whose weight or density may be zero, by whichever pass reads it first."""
    base, tuned = models(dtype)
    made = METHODS[method]
    if where == 0 and made.base != "required":
        pytest.skip("takes no base")
    spoiled = [base, *tuned][where]
    weights = {n: spoiled.read(n).reshape(spoiled.info(n).shape).clone() for n in spoiled.tensors}
    weights["layers.0.w"][70, 5] = bad
    inputs = [StateDict(weights, origin="spoiled") if c is spoiled else c for c in (base, *tuned)]
    anchor = inputs[0] if made.base == "required" else None
    with executing(Execution(chunk=TILE, kernels=Kernels())):
        node = Merge(inputs[1:], base=anchor, method=made, params=params, seed=3)
        with pytest.raises(DataError, match=r"^spoiled: tensor 'layers\.0\.w' has NaN or infinite"):
            node.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "params"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_fused_equals_torch(method: str, params: dict[str, object], dtype: torch.dtype) -> None:
    base, tuned = models(dtype)
    made = METHODS[method]

    def build() -> Merge:
        anchor = base if made.base == "required" else None
        return Merge(tuned, base=anchor, method=made, params=params, seed=3)

    with executing(Execution(chunk=TILE)):
        plain = build().state_dict()
    with executing(Execution(chunk=TILE, kernels=Kernels())):
        fused = build().state_dict()
    # floating sums may be added in another order: at most a rounding of the last place differs
    exact = {} if {"gram", "masses"} & _stats(made, params) else {"rtol": 0, "atol": 0}
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, **exact)


def _stats(made: object, params: dict[str, object]) -> set[str]:
    steps = made.pipeline(**params).steps  # type: ignore[attr-defined]
    return {name for b in steps if b.step.stat for name in b.step.stat.provides}


def test_rounding_is_to_nearest_even_once() -> None:
    """Means that fall half-way, and values that a detour through float32 would put half-way."""
    a = torch.tensor([1.0, 1.0078125, 3.0, -1.0, 2.0**-130, 3e38, 1.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0078125, 1.015625, -3.0, -1.0078125, 2.0**-131, 3e38, 1.0], dtype=torch.bfloat16)
    weights = [0.5, 0.5 + 1e-12]
    node = Merge(
        [StateDict({"w": a}), StateDict({"w": b})], method=METHODS["linear"],
        params={"weight": weights, "normalize": False},
    )  # fmt: skip
    with executing(Execution(kernels=Kernels())):
        fused = node.tensor("w", dtype=torch.bfloat16)
    exact = a.double() * weights[0] + b.double() * weights[1]
    candidates = torch.stack([exact.float().bfloat16(), fused]).double()
    assert (fused.double() - exact).abs().le((candidates - exact).abs().amin(0) + 0).all()
    assert fused[0] == 1.0078125  # a hair above the tie goes up, not to even


HALF = """\
import numpy as np
from weft.engine.kernels.primitives import short_f16, to_f16


def kernel(bits, floats, exact, rounded):
    for i in range(bits.shape[0]):
        floats[i] = short_f16(bits[i])
    for i in range(exact.shape[0]):
        rounded[i] = to_f16(exact[i])
"""


def test_every_float16() -> None:
    """Each is read as numpy reads it; each, the middle between two and what lies beside it is rounded once."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    meant = bits.view(np.float16).astype(np.float32)
    finite = np.sort(meant[np.isfinite(meant)].astype(np.float64))
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]
    ends = np.array([65519.99, 65520.0, 1e300, -np.inf, np.inf, -0.0, 2.0**-25, 2.0**-25 * 1.0001, 5e-324])
    exact = np.concatenate([finite, middle, *beside, ends, -ends])
    floats, rounded = np.empty(1 << 16, np.float32), np.empty(len(exact), np.uint16)
    Kernel(HALF)(bits, floats, exact, rounded)
    number = ~np.isnan(meant)
    assert (floats.view(np.uint32)[number] == meant.view(np.uint32)[number]).all()
    assert np.isnan(floats[~number]).all()
    with np.errstate(over="ignore"):
        assert (rounded == exact.astype(np.float16).view(np.uint16)).all()
    Kernel(HALF)(bits[:0], floats[:0], np.array([np.nan]), rounded[:1])
    assert np.isnan(rounded[:1].view(np.float16))[0]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32], ids=str
)
def test_rounding_by_kernels_is_that_of_torch(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50_000, generator=g, dtype=torch.float64)
    x *= 10.0 ** torch.empty_like(x).uniform_(-50, 6, generator=g)
    x[0, :4] = torch.tensor([0.0, -0.0, float("inf"), 1e300], dtype=torch.float64)
    plain = round_to(x, dtype)
    with executing(Execution(kernels=Kernels())):
        fused = round_to(x.T, dtype).T
    assert fused.dtype == dtype and torch.equal(fused.double().nan_to_num(7), plain.double().nan_to_num(7))


def test_many_ranges_equal_one() -> None:
    base, tuned = models(torch.bfloat16)
    node = {c: Merge(tuned, base=base, method=METHODS["della"], params={"density": 0.5}) for c in (1, 64)}
    results = []
    for chunk, made in node.items():
        with executing(Execution(chunk=chunk * TILE, kernels=Kernels())):
            results.append(made.state_dict())
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("wrong", [[1, 3], [14900, 14902], [14000, 15000], [32766, 32768], [14900, 14900]])
@pytest.mark.parametrize(("method", "params"), [c for c in CASES if c[0] in ("ties", "breadcrumbs")][:2])
def test_a_guess_of_a_threshold_never_decides(
    wrong: list[int], method: str, params: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too high, too low, too wide, empty: another pass puts it right."""
    base, tuned = models(torch.bfloat16)

    def build() -> dict[str, torch.Tensor]:
        return Merge(tuned, base=base, method=METHODS[method], params=params).state_dict()

    plain = build()
    hints = []

    def hint(self: Kernels, node: Merge, names: list[str], j: int) -> np.ndarray:
        step = node.pipeline(names[0]).steps[j]
        q = len(step.step.stat.ranks(step.params, 3, 10)[0])  # type: ignore[union-attr]
        hints.append(q)
        return np.tile(np.array(wrong), (3, q, 1))

    monkeypatch.setattr(Kernels, "hint", hint)
    with executing(Execution(chunk=TILE, kernels=Kernels())):
        guessed = build()
    assert hints and all(torch.equal(guessed[n], plain[n]) for n in plain)


ADD = """\
import numpy as np


def kernel(x, k, out):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * k + {more}
"""
RUN = """\
import sys
import numpy as np
from weft.engine.kernels.objects import Kernel
from weft.errors import DataError
x, out = np.arange(12, dtype=np.float32).reshape(3, 4), np.empty((3, 4))
Kernel(sys.argv[1])(x, np.uint32(3), out)
assert (out == x * 3.0 + 1).all()
print("numba" in sys.modules)
"""


def test_a_kernel_is_compiled_once_and_needs_no_numba_after(tmp_path: Path) -> None:
    """Damage to what is kept costs a compilation, nothing else."""

    def compiles() -> bool:
        env = os.environ | {"WEFT_CACHE": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", RUN, ADD.format(more=1)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout == "True\n"

    assert compiles() and not compiles()
    (kept,) = (tmp_path / "kernels").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert compiles() and not compiles()


def test_a_kernel_takes_any_types_and_writes_nowhere_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", "/dev/null/nowhere")
    add = Kernel(ADD.format(more=2))
    for dtype in (np.float32, np.float64, np.uint16):
        x, out = np.ones((2, 3), dtype), np.empty((2, 3))
        add(x, 0.5, out)
        assert (out == 2.5).all()
