"""Merged adapters against PEFT's add_weighted_adapter: equal where PEFT is right, different where it is not."""

from __future__ import annotations

import warnings
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")

import peft
from merging_models import NAMES, Net, config, delta, saved, with_adapters
from peft import LoraConfig, PeftModel
from peft.tuners.lora.model import LoraModel

import weft
from weft.adapters.merge import merge_adapters
from weft.adapters.output import AdapterCheckpoint
from weft.methods.dare import keep_mask
from weft.methods.step import At

TWO = {"a": config(4, 8), "b": config(4, 3)}
WEIGHTS = [0.7, -0.4]


@pytest.fixture
def model() -> PeftModel:
    return with_adapters(TWO)


def combined(model: PeftModel, how: str, weights: list[float] | None = None, **params: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["a", "b"], weights or WEIGHTS, "merged", combination_type=how, **params)


def best(whole: Tensor, rank: int) -> Tensor:
    """The best approximation at a rank."""
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def agree(made: AdapterCheckpoint, model: PeftModel, tolerance: float = 2e-6) -> None:
    for name in NAMES:
        theirs = delta(model, "merged", name)
        assert float((made.factors(name).delta() - theirs).norm() / theirs.norm()) < tolerance, name


def test_concat_and_svd_equal_peft(model: PeftModel, tmp_path: Path) -> None:
    paths = saved(model, tmp_path)
    combined(model, "cat")
    agree(merge_adapters(list(paths.values()), WEIGHTS, how="concat"), model)
    model.delete_adapter("merged")
    for rank in (None, 2, 6):
        combined(model, "svd", svd_rank=rank)
        made = merge_adapters(list(paths.values()), WEIGHTS, how="svd", rank=rank)
        agree(made, model)
        for name in NAMES:
            whole = sum(w * delta(model, n, name) for n, w in zip("ab", WEIGHTS, strict=True))
            assert isinstance(whole, Tensor)
            lost = (whole - delta(model, "merged", name)).norm() / whole.norm()
            assert made.report[name]["error"] == pytest.approx(float(lost), rel=1e-4)
        model.delete_adapter("merged")


@pytest.mark.parametrize(
    ("ours", "theirs", "params"),
    [
        ("linear", "linear", {}),
        ("magnitude_prune_factors", "magnitude_prune", {"density": 0.3}),
        ("ties_factors", "ties", {"density": 0.4}),
        ("ties_factors", "ties", {"density": 0.4, "elect": "count"}),
    ],
)
@pytest.mark.parametrize("weights", [[1.0, 1.0], WEIGHTS])
def test_factors_merged_by_themselves_equal_peft(
    model: PeftModel, tmp_path: Path, ours: str, theirs: str, params: dict[str, Any], weights: list[float]
) -> None:
    paths = saved(model, tmp_path)
    given = {k: v for k, v in params.items() if k != "elect"}
    method = {"majority_sign_method": "frequency"} if "elect" in params else {}
    combined(model, theirs, weights, **given, **method)
    agree(merge_adapters(list(paths.values()), weights, how=ours, **params), model)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dropped_factors_equal_peft_given_the_same_masks(
    model: PeftModel, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = saved(model, tmp_path)
    drawn = iter(
        [(n, part, i) for n in NAMES for part in ("lora_A", "lora_B") for i in range(2)]
    )  # the order in which PEFT asks

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        name, part, i = next(drawn)
        both = torch.stack([tensor, tensor]).double()
        mask = keep_mask(both, density, At(f"{name}.{part}", seed=5))[i]
        return tensor * mask / density

    monkeypatch.setattr(peft.utils.merge_utils, "random_pruning", pruned)
    combined(model, kind, density=0.6)
    agree(merge_adapters(list(paths.values()), WEIGHTS, how=f"{kind}_factors", density=0.6, seed=5), model)


@pytest.mark.parametrize("elect", ["mass", "count"])
def test_ties_on_products_equals_peft_for_equal_weights(model: PeftModel, tmp_path: Path, elect: str) -> None:
    paths = saved(model, tmp_path)
    method = "total" if elect == "mass" else "frequency"
    combined(model, "ties_svd", [1.0, 1.0], svd_rank=8, density=0.3, majority_sign_method=method)
    made = merge_adapters(
        list(paths.values()), [1.0, 1.0], how="ties", rank=8, density=0.3, scope="tensor", tie="plus", elect=elect
    )  # fmt: skip
    # of equal singular values, and of float32's rounding, PEFT's SVD may choose otherwise
    agree(made, model, tolerance=1e-5)


def test_cross_terms_of_linear_are_what_the_algebra_says(tmp_path: Path) -> None:
    """k equal adapters at 1/k come out k times too strong; independent ones keep a cosine of 1/√k."""
    model = with_adapters({"a": config(4, 8), "b": config(4, 8)})
    paths = saved(model, tmp_path)
    twice = merge_adapters([paths["a"], paths["a"]], how="linear")
    exact = merge_adapters([paths["a"], paths["a"]], how="concat")
    for name in NAMES:
        torch.testing.assert_close(twice.factors(name).delta(), 2 * exact.factors(name).delta())
        assert twice.report[name]["overlap"] == pytest.approx(1.0)


def test_the_cosine_of_linear_with_independent_adapters() -> None:
    from weft.adapters.factors import Factors
    from weft.adapters.peft_ways import linear

    g = torch.Generator().manual_seed(0)
    for k in (2, 4, 8):
        updates = [
            Factors(
                torch.randn(400, 8, generator=g, dtype=torch.float64),
                torch.randn(8, 400, generator=g, dtype=torch.float64),
                (400, 400),
            )
            for _ in range(k)
        ]
        exact = sum(f.delta() for f in updates) / k
        assert isinstance(exact, Tensor)
        made = linear(updates, [1 / k] * k).delta()
        cosine = float((made * exact).sum() / made.norm() / exact.norm())
        assert cosine == pytest.approx(1 / sqrt(k), abs=0.04)


def test_a_merged_rslora_adapter_keeps_its_strength_where_peft_multiplies_it(tmp_path: Path) -> None:
    """PEFT 0.21 copies use_rslora to the merged config, and every reload multiplies by √rank."""
    settings = {"a": config(8, 8, use_rslora=True), "b": config(8, 8, use_rslora=True)}
    model = with_adapters(settings)
    paths = saved(model, tmp_path / "in")
    exact = {n: best(0.5 * delta(model, "a", n) + 0.5 * delta(model, "b", n), 8) for n in NAMES}
    combined(model, "svd", [0.5, 0.5], svd_rank=8)
    theirs = saved(model, tmp_path / "peft")["merged"]
    made = merge_adapters([paths["a"], paths["b"]], [0.5, 0.5], rank=8)
    weft.save(made, tmp_path / "weft")
    for folder, factor in ((tmp_path / "weft", 1.0), (theirs, sqrt(8))):
        loaded = PeftModel.from_pretrained(Net(), str(folder))
        for name in NAMES:
            found = delta(loaded, "default", name)
            torch.testing.assert_close(found, factor * exact[name], atol=2e-5, rtol=1e-4)
        if tuple(int(v) for v in peft.__version__.split(".")[:2]) > (0, 21):
            break  # a later PEFT has mended it


def test_svd_of_scaled_adapters_is_not_scaled_twice(tmp_path: Path) -> None:
    """PEFT 0.9 to 0.20 multiplied by alpha/r twice in the svd family; 0.21 does not, nor does weft."""
    model = with_adapters({"a": config(4, 16), "b": config(4, 16)})
    paths = saved(model, tmp_path)
    made = merge_adapters([paths["a"], paths["b"]], [0.5, 0.5], rank=8)
    combined(model, "svd", [0.5, 0.5], svd_rank=8)
    factor = 4.0 if tuple(int(v) for v in peft.__version__.split(".")[:2]) <= (0, 20) else 1.0
    for name in NAMES:
        exact = 0.5 * delta(model, "a", name) + 0.5 * delta(model, "b", name)
        torch.testing.assert_close(made.factors(name).delta(), exact, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(delta(model, "merged", name), factor * exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["concat", "svd", "linear", "ties", "knots", "lego"])
def test_peft_loads_what_is_saved_and_computes_the_same_function(
    model: PeftModel, tmp_path: Path, how: str
) -> None:
    paths = saved(model, tmp_path / "in")
    made = merge_adapters([paths["a"], paths["b"]], WEIGHTS, how=how)
    weft.save(made, tmp_path / "out")
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path / "out"))
    state = {n: t.double() for n, t in Net().state_dict().items()}
    for name in NAMES:
        state[name] = state[name] + made.factors(name).delta()
    whole = Net().double()
    whole.load_state_dict(state)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loaded(x).double(), whole(x.double()), atol=1e-5, rtol=1e-5)


def test_adapters_of_different_ranks_and_patterns(tmp_path: Path) -> None:
    model = with_adapters({
        "a": config(2, 8), "b": LoraConfig(r=4, lora_alpha=4, target_modules=["up", "down"],
                                           rank_pattern={"block.up": 6}, alpha_pattern={"block.down": 12}),
    })  # fmt: skip
    paths = saved(model, tmp_path)
    made = merge_adapters([paths["a"], paths["b"]], [0.5, 2.0], how="concat")
    assert [made.factors(n).rank for n in NAMES] == [8, 6]
    for name in NAMES:
        exact = 0.5 * delta(model, "a", name) + 2.0 * delta(model, "b", name)
        torch.testing.assert_close(made.factors(name).delta(), exact, atol=1e-5, rtol=1e-5)


def test_the_installed_peft_is_the_one_these_tests_know() -> None:
    assert hasattr(LoraModel, "add_weighted_adapter")


class Pixels(torch.nn.Module):
    """An embedding, a convolution and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 9)
        self.conv = torch.nn.Conv2d(1, 6, 3, bias=False)
        self.out = torch.nn.Linear(7, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        made: Tensor = self.out(self.conv(self.embed(tokens)[:, None]).flatten(2).mean(1)[:, :7])
        return made


@pytest.mark.parametrize("how", ["concat", "svd", "ties"])
def test_convolutions_and_embeddings_merge_as_linear_layers_do(tmp_path: Path, how: str) -> None:
    settings = {n: LoraConfig(r=3, lora_alpha=6, target_modules=["embed", "conv", "out"]) for n in "ab"}
    model = with_adapters(settings, Pixels())
    paths = saved(model, tmp_path / "in")
    params = {"density": 1.0, "scope": "tensor", "rank": 9} if how == "ties" else {}
    made = merge_adapters([paths["a"], paths["b"]], [1.0, 0.5], how=how, **params)
    for name in ("embed.weight", "conv.weight", "out.weight"):
        a, b = delta(model, "a", name), 0.5 * delta(model, "b", name)
        if how == "ties":
            # with both agreeing the weighted mean, else the larger by itself
            both, sign = torch.stack([a, b]), (a + b).sign()
            agree = both.sign() == sign
            weight = torch.tensor([1.0, 0.5], dtype=torch.float64).reshape(2, *[1] * a.ndim)
            exact = (both * agree).sum(0) / (weight * agree).sum(0)
        else:
            exact = a + b
        whole = exact.flatten(1)
        rank = made.factors(name).rank
        expected = best(whole, rank).reshape(exact.shape)
        torch.testing.assert_close(made.factors(name).delta(), expected, atol=1e-5, rtol=1e-4)
    weft.save(made, tmp_path / "out")
    loaded = PeftModel.from_pretrained(Pixels(), str(tmp_path / "out"))
    state = {n: t.double() for n, t in Pixels().state_dict().items()}
    for name in ("embed.weight", "conv.weight", "out.weight"):
        state[name] = state[name] + made.factors(name).delta()
    whole_model = Pixels().double()
    whole_model.load_state_dict(state)
    tokens = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(tokens).double(), whole_model(tokens), atol=1e-5, rtol=1e-5)
