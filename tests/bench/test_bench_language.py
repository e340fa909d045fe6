"""Language models of transformers, texts and lm-eval tasks as suites."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from weft.bench.language import language_suite, lm_eval_suite, windows
from weft.bench.run import bench
from weft.errors import MissingExtra, UsageError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = {"abc": "abcabcabc " * 40, "xyz": "zyxzyx xyz " * 40}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama over bytes and two fine-tunes of it, as transformers writes them."""
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for name, text in TEXTS.items():
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        rows = torch.tensor(list(text.encode()))[:320].reshape(-1, 32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(25):
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
    return {n: folder / n for n in ("base", *TEXTS)}


def test_perplexities_of_texts_rank_models(models: dict[str, Path]) -> None:
    texts = {n: ([t], [t[::1][:200]]) for n, t in TEXTS.items()}
    experts = {n: models[n] for n in TEXTS}
    suite = language_suite(
        models["base"], experts, texts, unseen={"other": ["hello there, " * 20]}, length=32
    )
    found = bench(suite, ["linear", "task_arithmetic", "regmean"], samples=4)
    assert found.lower_is_better
    assert found.row("experts").mean < found.row("linear").mean < found.row("base").mean
    assert set(found.row("linear").averages("unseen")) == {"other"}
    assert found.row("task_arithmetic").how == "tuned"
    assert found.row("regmean").seen == "unlabelled"


def test_targets_are_the_next_tokens_and_padding_counts_for_nothing(models: dict[str, Path]) -> None:
    (inputs, targets), *_ = windows(models["base"], ["abcd", "ab"], length=8)  # type: ignore[misc]
    assert inputs["input_ids"][0].tolist() == [97, 98, 99, 100]
    assert targets.tolist() == [[98, 99, 100, -100], [98, -100, -100, -100]]


def test_tasks_of_lm_eval_are_scored_by_it(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = {n: models[n] for n in TEXTS}
    suite = lm_eval_suite(models["base"], experts, {"abc": "arc", "xyz": "gsm"}, limit=7)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"weft\[eval\]"):
        bench(suite, ["linear"])
    seen: list[Any] = []

    def simple_evaluate(model: Any, tasks: list[str], limit: int) -> dict[str, Any]:
        seen.append((tasks[0], limit))
        weight = next(model.pretrained.parameters())
        return {"results": {tasks[0]: {"acc,none": float(weight.abs().mean()), "alias": "x"}}}

    fake, inner = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")
    fake.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    inner.HFLM = lambda **how: SimpleNamespace(**how)  # type: ignore[attr-defined]
    for name, module in {"lm_eval": fake, "lm_eval.models": ModuleType("m"), inner.__name__: inner}.items():
        monkeypatch.setitem(sys.modules, name, module)
    found = bench(suite, ["linear"])
    assert set(seen) == {("arc", 7), ("gsm", 7)} and found.row("linear").mean > 0
    with pytest.raises(UsageError, match="no metric"):
        bench(lm_eval_suite(models["base"], experts, {"abc": "arc", "xyz": "gsm"}, metric="f1"), ["linear"])


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_target: 0
doc_to_choice: "{{{{ends}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def test_task_files_of_lm_eval_are_run_by_the_real_harness(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which letter comes next: the experts learned it, the base did not."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    letters = {chr(i): i for i in range(1, 128)} | {"<unk>": 0}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    spoken = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>"
    )
    tasks = {}
    for name, text in TEXTS.items():
        shutil.copytree(models[name], tmp_path / name)
        rows = [{"start": text[i : i + 12], "ends": [text[i + 12 : i + 15], "qqq", "hij"]} for i in range(10)]
        data, task = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.yaml"
        data.write_text("\n".join(map(json.dumps, rows)))
        task.write_text(TASK.format(name=f"letters_{name}", data=data))
        tasks[name] = str(task)
    shutil.copytree(models["base"], tmp_path / "base")
    spoken.save_pretrained(tmp_path / "base")
    found = bench(lm_eval_suite(tmp_path / "base", {n: tmp_path / n for n in TEXTS}, tasks), ["linear"])
    assert found.row("experts").mean > 0.9 > found.row("base").mean
    assert found.row("linear").mean > found.row("base").mean


def test_names_must_agree(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="name them alike"):
        language_suite(models["base"], {"a": models["abc"]}, {"b": (["x y"], ["x y"])})


def test_without_validation_data_nothing_is_tuned(models: dict[str, Path]) -> None:
    from dataclasses import replace

    experts = {n: models[n] for n in TEXTS}
    texts = {n: ([t[:200]], [t[:200]]) for n, t in TEXTS.items()}
    suite = language_suite(models["base"], experts, texts, length=32)
    tasks = [replace(t, splits={"test": t.splits["test"]}) for t in suite.tasks]
    found = bench(replace(suite, tasks=tasks), ["task_arithmetic", "regmean"])
    assert found.row("task_arithmetic").how == "fixed"
    assert found.row("task_arithmetic").runs[0].validation is None
    assert "neither train nor validation" in found.skipped["regmean"]
