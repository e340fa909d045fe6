"""weft against what MergeKit 0.1.5 wrote for the same recipes: equal to float32 rounding, or a listed difference.

`goldens.npz` was made by benchmarks/parity.py, which ran both. A difference is asserted to be one, and what weft
gives instead is held against a float64 reference written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, WORDS, Case, filled, models, ours, projections
from safetensors.torch import load_file

import weft
from weft.recipes import check
from weft.recipes.mergekit import SPELLINGS

GOLDENS = np.load(Path(__file__).with_name("goldens.npz"))
NAMES: dict[str, Any] = json.loads(str(GOLDENS["names"]))
ROOT = Path(__file__).parents[2]
State = dict[str, torch.Tensor]
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return models(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def raw(paths: dict[str, Path]) -> Callable[[str], State]:
    def read(name: str) -> State:
        return {n: t.double() for n, t in load_file(paths[name] / "model.safetensors").items()}

    return read


def made(case: Case, paths: dict[str, Path]) -> State:
    return ours(case, filled(case, paths)).state_dict()


def distance(mine: State, case: Case) -> float:
    """The largest error of a projection, relative to the tensor's largest value times the root of its size."""
    theirs = {n: mine[n] for n in NAMES[case.name]}
    scale = [float(t.double().abs().max()) * t.numel() ** 0.5 for _, t in sorted(theirs.items())]
    return float((np.abs(projections(theirs) - GOLDENS[case.name]) / np.maximum(scale, 1e-12)[:, None]).max())


def case_named(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


@pytest.mark.parametrize("case", [c for c in CASES if not c.differs], ids=lambda c: c.name)
def test_equal(case: Case, paths: dict[str, Path]) -> None:
    mine = made(case, paths)
    assert sorted(mine) == NAMES[case.name]
    assert distance(mine, case) < 4 * case.tolerance


def test_the_comparison_would_see_one_entry_of_one_tensor(paths: dict[str, Path]) -> None:
    case = case_named("linear")
    mine = made(case, paths)
    mine[NORM] = mine[NORM].clone()
    mine[NORM][3] *= 1 + 1e-3
    assert distance(mine, case) > 10 * case.tolerance


# -- differences: what weft gives instead ---------------------------------------------------------------------

Read = Callable[[str], State]


def twice(raw: Read) -> State:
    a, b = raw("a"), raw("b")
    return {n: (2 * a[n] + b[n]) / 3 for n in a}


def weighted(raw: Read) -> State:
    a, b, c = raw("a"), raw("b"), raw("c")
    return {n: (a[n] + 0.5 * b[n] + 0.25 * c[n]) / 1.75 for n in a}


def two_slices(raw: Read) -> State:
    a, c = raw("a"), raw("c")
    both = {n: 0.7 * a[n] + 0.3 * c[n] for n in a}
    return {n: a[n] if n == EMBED or re.search(r"layers\.[01]\.", n) else both[n] for n in a}


def union(raw: Read) -> State:
    """Rows by token: `moved` has the base's words in another order; only `more` has the two new ones."""
    base, more, moved = raw("base"), raw("more"), raw("moved")
    place = {w: i for i, w in enumerate([*WORDS[:3], *reversed(WORDS[3:])])}
    order = [place[w] for w in WORDS]
    rows = {n: torch.cat([0.5 * base[n] + 0.25 * more[n][:32] + 0.25 * moved[n][order], more[n][32:]])
            for n in (EMBED, HEAD)}  # fmt: skip
    rest = {n: 0.5 * base[n] + 0.25 * more[n] + 0.25 * moved[n] for n in base if n not in rows}
    return rest | rows


def by_name(raw: Read) -> State:
    """`w5` and `new1` are forced to rows of `more`; a model that lacks `new2` has zeros there."""
    base, more = raw("base"), raw("more")
    found = {
        n: 0.5 * base[n] + 0.5 * more[n][:32] if n in (EMBED, HEAD) else 0.5 * (base[n] + more[n])
        for n in base
    }
    for n in (EMBED, HEAD):
        found[n][WORDS.index("w5")] = more[n][WORDS.index("w6")]
        found[n] = torch.cat([found[n], more[n][32:33], 0.5 * more[n][33:34]])
    return found


def plain_ties(raw: Read) -> State:
    """Trim, elect by the weighted sum, mean of what agrees: no rescaling."""
    base, found = raw("base"), {}
    for name in base:
        x = torch.stack([raw(n)[name] - base[name] for n in "abc"])
        flat = x.abs().reshape(3, -1)
        cut = flat.sort(descending=True).values[:, x[0].numel() // 2 - 1]
        w = torch.tensor([1, 0.5, 0.25]).double().reshape(3, *[1] * (x.ndim - 1))
        x = torch.where(x.abs() >= cut.reshape(w.shape), x, 0) * w
        agree = torch.where(x.sum(0) >= 0, 1, -1) == x.sign()
        found[name] = base[name] + (x * agree).sum(0) / (w * agree).sum(0).clamp(min=1e-12)
    return found


def squares(raw: Read) -> State:
    """SCE of two models that select everything: weights by mean squares, then the sign of the larger sum."""
    base, found = raw("base"), {}
    for name in base:
        x = torch.stack([raw(n)[name] - base[name] for n in ("hair", "hair2")])
        x = x * (x[0] != x[1])  # MergeKit selects among the entries that vary
        w = x.square().flatten(1).mean(1)
        w = (w / w.sum()).reshape(2, *[1] * (x.ndim - 1))
        agree = torch.where(x.sum(0) >= 0, 1, -1) == x.sign()
        found[name] = base[name] + (x * w * agree).sum(0) / (w * agree).sum(0).clamp(min=1e-12)
    return found


RIGHT: dict[str, Callable[[Read], State]] = {
    "ties, rescaled": plain_ties,
    "tokenizer union": union,
    "tokenizer, rows by name": by_name,
    "slices, one model and two": two_slices,
    "linear, base not listed": weighted,
    "linear, a model twice": twice,
    "sce, tiny differences": squares,
}


@pytest.mark.parametrize("name", RIGHT)
def test_differs_and_is_right(name: str, paths: dict[str, Path], raw: Read) -> None:
    case = case_named(name)
    mine, right = made(case, paths), RIGHT[name](raw)
    assert mine.keys() == right.keys()
    for n, t in right.items():
        torch.testing.assert_close(mine[n].double(), t, rtol=1e-6, atol=1e-7)
    assert isinstance(NAMES[name], str) or distance(mine, case) > 1e-5


def test_bfloat16_is_rounded_once(paths: dict[str, Path], raw: Read) -> None:
    case = case_named("linear, bfloat16")
    mine, right = made(case, paths), weighted(raw)
    assert all(torch.equal(mine[n], t.bfloat16()) for n, t in right.items())
    assert distance(mine, case) > 1e-4


def test_karcher_merges_what_is_listed(paths: dict[str, Path]) -> None:
    case, without = case_named("karcher, base not listed"), case_named("karcher")
    mine = made(case, paths)
    assert distance(mine, without) < 4 * without.tolerance < distance(mine, case)


def test_parts_that_no_module_names_go_with_the_first_and_the_last(paths: dict[str, Path], raw: Read) -> None:
    case = case_named("modules")
    mine, base, a, b = made(case, paths), raw("t5"), raw("t5a"), raw("t5b")
    assert distance(mine, case) < 4 * case.tolerance
    weights = {"shared.weight": (0.5, 0.2), "lm_head.weight": (0.1, 0.9)}  # the encoder's, the decoder's
    assert mine.keys() - set(NAMES["modules"]) == weights.keys()
    for n, (wa, wb) in weights.items():
        right = base[n] + wa * (a[n] - base[n]) + wb * (b[n] - base[n])
        torch.testing.assert_close(mine[n].double(), right, rtol=1e-6, atol=1e-6)


def test_rows_of_other_tokens_are_not_mixed(paths: dict[str, Path]) -> None:
    case = case_named("other vocabularies, no policy")
    assert isinstance(NAMES[case.name], str)
    with pytest.raises(weft.WeftError, match="set tokenizer_source"):
        made(case, paths)


@pytest.mark.parametrize("name", ["moe, hidden", "moe, hidden_avg"])
def test_routers_differ_by_the_rounding_of_the_base(name: str, paths: dict[str, Path]) -> None:
    case = case_named(name)
    mine = made(case, paths)
    assert 2e-6 < distance(mine, case) < case.tolerance
    far = np.abs(projections({n: mine[n] for n in NAMES[name]}) - GOLDENS[name]).max(1) > 1e-3
    assert {n for n, is_far in zip(NAMES[name], far, strict=True) if is_far} <= {
        n for n in mine if "gate.w" in n
    }


@pytest.mark.parametrize("name", ["dare_ties", "della"])
def test_random_masks_are_another_draw_and_always_the_same(name: str, paths: dict[str, Path]) -> None:
    case = case_named(name)
    one, two = made(case, paths), made(case, paths)
    assert distance(one, case) > 1e-3
    assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_every_case_is_held_against_something() -> None:
    own = {"linear, bfloat16", "karcher, base not listed", "modules", "other vocabularies, no policy", "dare_ties",
           "della", "moe, hidden", "moe, hidden_avg"}  # fmt: skip
    assert {c.name for c in CASES if c.differs} == set(RIGHT) | own
    assert {c.name for c in CASES} == set(NAMES)


def test_every_method_of_mergekit_is_among_the_cases() -> None:
    text = "\n".join(c.recipe for c in CASES)
    lacking = {m for m in SPELLINGS if not re.search(rf"merge_method: {m}\n", text)}
    assert lacking == {"della_linear"}  # it drops at random whatever its density


def test_the_page_lists_every_difference() -> None:
    page = (ROOT / "docs" / "differences-from-mergekit.md").read_text()
    assert all(f"| {c.name} |" in page and c.differs in page for c in CASES)


def test_check_says_what_differs(paths: dict[str, Path]) -> None:
    for name, told in (("karcher, base not listed", "base_model is not merged"), ("dare_ties", "another draw"),
                       ("linear, a model twice", "counts twice"), ("linear, bfloat16", "computes in bfloat16"),
                       ("model_stock, tiny differences", "true angle")):  # fmt: skip
        report = check(filled(case_named(name), paths))
        assert any(told in d for d in report.differences), (name, report.differences)
