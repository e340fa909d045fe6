"""Search files: read strictly, every problem at once, and carried out as the Python call is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from three_models import RECIPE, WEIGHTS

import weft
from weft.errors import MissingExtra, Problems, UsageError
from weft.search.file import read_task
from weft.search.objective import LmEval, Perplexity, imported

TEXT = """
recipe: recipe.yml
space:
  models[*].parameters.weight: {low: 0, high: 1}
  parameters.normalize: [true, false]
objectives:
  - {function: "scores:distance", direction: minimize}
validation: dev
test: held-out
sampler: {name: tpe, startup: 3}
trials: 6
seed: 5
start:
  - {"models[*].parameters.weight": 0.5}
"""

SCORES = """
def distance(candidate, split):
    total = sum(float(candidate.tensor(n).double().square().sum()) for n in candidate)
    return total + (100 if split == "held-out" else 0)
def make(): return None
name = "no function"
"""


@pytest.fixture
def scores(models: Path) -> Iterator[Path]:
    """A module in the current folder, as a user has one."""
    (models / "scores.py").write_text(SCORES)
    imported.cache_clear()
    yield models
    sys.modules.pop("scores", None)
    imported.cache_clear()


def test_a_file_and_the_call_it_stands_for_agree(scores: Path) -> None:
    (scores / "search.yml").write_text(TEXT)
    found = weft.search("search.yml")
    assert found.trials[0].settings["models[1].parameters.weight"] == 0.5
    again = weft.search(
        "recipe.yml", {WEIGHTS: {"low": 0, "high": 1}, "parameters.normalize": [True, False]},
        imported("scores:distance"), validation="dev", test="held-out", direction="minimize", trials=6, seed=5,
        sampler=read_task("search.yml").sampler,
        start=[{"models[0].parameters.weight": 0.5, "models[1].parameters.weight": 0.5}],
    )  # fmt: skip
    assert [t.settings for t in found.trials] == [t.settings for t in again.trials]
    assert found.test == again.test and found.test is not None


def test_a_recipe_may_stand_in_the_file(scores: Path) -> None:
    inline = "recipe:" + RECIPE.replace("\n", "\n  ")
    found = weft.search(TEXT.replace("recipe: recipe.yml", inline.rstrip()))
    assert len(found.trials) == 6


def test_every_problem_comes_at_once_with_its_line(scores: Path) -> None:
    wrong = TEXT.replace("low: 0", "lo: 0").replace("minimize", "smallest").replace("startup", "start_up")
    wrong = wrong.replace("trials: 6", "trials: many")
    with pytest.raises(Problems) as caught:
        read_task(wrong)
    said = "\n".join(caught.value.problems)
    assert len(caught.value.problems) >= 5
    for text in (
        "line 4, space.models[*].parameters.weight.lo: unknown key; did you mean 'low'?",
        "objectives[0]: direction must be maximize or minimize, not 'smallest'",
        "line 10, sampler.start_up: unknown key; did you mean 'startup'?",
        "line 11, trials: must be a whole number, not 'many'",
    ):
        assert text in said, said


@pytest.mark.parametrize(("change", "said"), [
    (("validation: dev\n", ""), "validation: is missing: name the data"),
    (("recipe: recipe.yml", "recipes: recipe.yml"), "did you mean 'recipe'"),
    (("recipe.yml", "recpe.yml"), "did you mean 'recipe.yml'"),
    (("scores:distance", "scores:distanse"), "did you mean 'distance'"),
    (("scores:distance", "score5:distance"), "cannot be imported"),
    (("scores:distance", "scores"), "package.module:function"),
    (("test: held-out", "test: dev"), "reported on what it was picked by"),
    ((', direction: minimize', ''), "direction is missing"),
    (("function:", "perplexity: true, function:"), "must have one of"),
    (('function: "scores:distance"', "perplexity: true"), "measured on a text file, and there is none at dev"),
    ((TEXT[TEXT.index("start:") :], "start: 3\n"), "must be a list of settings"),
    (("- {\"models[*].parameters.weight\": 0.5}", "- {\"models[*].parameters.weight\": 2}"), r"in \[0, 1\]"),
    (("name: tpe", "name: tpee"), "did you mean 'tpe'"),
    (("seed: 5", "seed: 5\nexecutor: cloud"), "choose local or ray"),
    (("seed: 5", "seed: 5\nmemory: lots"), "is no size"),
])  # fmt: skip
def test_what_a_search_file_cannot_say(scores: Path, change: tuple[str, str], said: str) -> None:
    assert change[0] in TEXT
    with pytest.raises(UsageError, match=said):
        weft.search(TEXT.replace(*change))


def test_no_anchors_no_second_document_no_missing_file(models: Path) -> None:
    for text, said in (
        ("a: &x 1\nb: *x\n", "anchors"), ("recipe: a\n---\nrecipe: b\n", "one YAML document"),
        ("- 1\n- 2\n", "a mapping of keys"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            read_task(text)
    with pytest.raises(UsageError, match=r"there is no search file serach\.yml"):
        read_task("serach.yml")


def test_perplexity_is_of_the_file_that_the_split_names(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for the room that measures it: what it is asked, and that less is better."""
    asked: list[Any] = []

    def perplexity(checkpoint: Any, texts: Path, **options: Any) -> float:
        asked.append((texts, options))
        return 7.0

    room = ModuleType("weft.llm.perplexity")
    room.perplexity = perplexity  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weft.llm.perplexity", room)
    (models / "dev.txt").write_text("a b")
    (models / "test.txt").write_text("c d")
    text = re.sub(r"  - \{function.*\n", "  - {perplexity: {window: 64}}\n", TEXT)
    text = text.replace("validation: dev", "validation: dev.txt").replace("held-out", "test.txt")
    task = read_task(text)
    assert task.objectives[0].direction == "minimize" and isinstance(task.objectives[0].score, Perplexity)
    assert weft.search(text).test == {"perplexity": 7.0}
    assert asked[0] == (Path("dev.txt"), {"window": 64}) and asked[-1][0] == Path("test.txt")
    (models / "test.txt").write_text("a b")
    with pytest.raises(UsageError, match="picked by"):
        read_task(text)


def test_lm_eval_is_asked_for_the_task_that_the_split_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the harness's results layout; the harness itself is not installed here."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"install weft\[eval\]"):
        LmEval("acc")(object(), "arc_easy")  # type: ignore[arg-type]
    asked: dict[str, Any] = {}

    def simple_evaluate(**how: Any) -> Any:
        asked.update(how)
        return {"results": {how["tasks"][0]: {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.01}}}

    harness, models = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models.HFLM = lambda **how: SimpleNamespace(**how)  # type: ignore[attr-defined]
    room = ModuleType("weft.llm.hf")
    room.to_transformers = lambda c: "module"  # type: ignore[attr-defined]
    room.tokenizer_of = lambda c: "tokenizer"  # type: ignore[attr-defined]
    for name, module in (("lm_eval", harness), ("lm_eval.models", ModuleType("lm_eval.models")),
                         ("lm_eval.models.huggingface", models), ("weft.llm.hf", room)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    assert LmEval("acc", {"limit": 5})(object(), "arc_easy") == 0.25  # type: ignore[arg-type]
    assert asked["limit"] == 5 and asked["model"].pretrained == "module"
    with pytest.raises(UsageError, match="task arc_easy has no metric accc"):
        LmEval("accc")(object(), "arc_easy")  # type: ignore[arg-type]


def test_a_function_must_be_one(scores: Path) -> None:
    with pytest.raises(UsageError, match="has no function 'name'"):
        imported("scores:name")
    text = TEXT.replace("direction: minimize", 'direction: minimize, module: "scores:make"')
    with pytest.raises(UsageError, match="gave no torch module"):
        weft.search(text)


def test_perplexity_of_real_candidates_chooses_the_model_that_knows_the_text(models: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config)
    ids = torch.tensor(list(b"ab" * 32))[None]
    net.save_pretrained("blank")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        net(ids, labels=ids).loss.backward()
        optimizer.step()
    net.save_pretrained("taught")
    (models / "dev.txt").write_text("ab" * 40)
    (models / "held.txt").write_text("ba" * 40)
    found = weft.search({
        "recipe": {"merge_method": "linear", "models": ["blank", "taught"]},
        "space": {"share": {"simplex": "models[*].parameters.weight"}},
        "objectives": [{"perplexity": {"window": 32}}],
        "validation": "dev.txt", "test": "held.txt", "sampler": "random", "trials": 8,
    })  # fmt: skip
    best = max(t.settings["models[1].parameters.weight"] for t in found.trials)
    assert found.best.settings["models[1].parameters.weight"] == best
    assert found.best.scores["perplexity"] < 10 < max(t.scores["perplexity"] for t in found.trials)
    assert found.test is not None and found.test["perplexity"] < 15


def test_the_search_files_of_the_page_are_understood(models: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
    files = re.findall(r"^```YAML\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (models / "mine.py").write_text("def accuracy(checkpoint, split): return 1.0\n")
    for name in ("dev.txt", "test.txt"):
        (models / name).write_text(name)
    assert len(files) >= 2
    for text in files:
        assert read_task(text).space.dimensions
