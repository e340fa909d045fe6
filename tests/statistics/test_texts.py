"""Batches from texts and data sets, and `weft measure` as it is typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from weft.cli.main import main
from weft.errors import DataError, UsageError
from weft.statistics import measure, rows, texts
from weft.statistics.texts import padded

DATA = """
import torch
from torch import nn
def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, generator=g), torch.randint(0, 2, (6,), generator=g)) for _ in range(2)]
def module():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
def squares(outputs, batch):
    return outputs.square().sum(1)
"""


class Words:
    """A tokenizer: one id a word."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(w) for w in text.split()]}


def test_windows_and_padding(tmp_path: Path):
    made = texts(["aa b ccc dd e", "ffff g", "x"], Words(), vocabulary=9, length=3, batch=2, labels=True)
    assert [b["input_ids"].tolist() for b in made] == [[[2, 1, 3], [2, 1, 0]], [[4, 1]]]
    assert [b["attention_mask"].tolist() for b in made] == [[[1, 1, 1], [1, 1, 0]], [[1, 1]]]
    assert made[0]["labels"] is made[0]["input_ids"]
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "hello"}\n{"text": "you"}\n')
    assert padded([[1], [2, 3]])["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert texts(path, length=4)[0]["input_ids"].tolist() == [[104, 101, 108, 108], [121, 111, 117, 0]]
    with pytest.raises(DataError, match="not two tokens"):
        texts(["x"], Words())
    with pytest.raises(UsageError, match="length 1"):
        texts(["x y"], Words(), length=1)


def test_rows_of_a_data_set_come_anew_in_every_pass():
    data = [
        {"sentence": "a bb ccc", "label": 1},
        {"sentence": "dd e", "label": 0},
        {"sentence": "f g h i", "label": 1},
    ]
    given = rows(data, Words(), text="sentence", length=3, batch=2)
    first, again = list(given), list(given)
    assert [b["labels"].tolist() for b in first] == [[1, 0], [1]]
    assert first[0]["input_ids"].tolist() == [[1, 2, 3], [2, 1, 0]] == again[0]["input_ids"].tolist()
    assert "labels" not in next(iter(rows(data, Words(), text="sentence", label=None)))
    with pytest.raises(UsageError, match=r"a row has no 'text'; it has sentence, label"):
        next(iter(rows(data, Words())))
    with pytest.raises(DataError, match="has no tokens"):
        next(iter(rows([{"text": "", "label": 0}], Words())))


def test_a_classifier_of_transformers_on_rows():
    """Two passes over one data set: Gram matrices, and Fisher information of the given labels."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    net = BertForSequenceClassification(config).eval()
    data = [{"text": "a bb ccc", "label": 1}, {"text": "dd e", "label": 0}, {"text": "f g h i", "label": 1}]
    with pytest.warns(match="position_embeddings"):
        found = measure(
            net, rows(data, Words(), batch=2), ("gram", "fisher"), labels="given", dtype=torch.float64
        )
    total = torch.zeros_like(net.classifier.weight)
    for row in data:
        ids = torch.tensor([Words()(row["text"])["input_ids"]])
        net.zero_grad()
        net(input_ids=ids, labels=torch.tensor([row["label"]])).loss.backward()
        total += net.classifier.weight.grad.square()
    torch.testing.assert_close(
        found.tensor("fisher/classifier.weight").float(), total / 3, rtol=1e-3, atol=1e-7
    )


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", "measure", *words])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "measured_data", raising=False)
    (tmp_path / "measured_data.py").write_text(DATA)
    torch.manual_seed(0)
    weft.save(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), tmp_path / "net")
    return tmp_path


def test_the_command_is_the_function(here, monkeypatch, capsys):
    own = ("--data", "measured_data:batches", "--module", "measured_data:module")
    assert (
        typed(monkeypatch, "net", "stats", *own, "--what", "gram,fisher", "--labels", "given", "--json") == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (
        told["samples"] == 12
        and told["what"] == ["fisher", "gram"]
        and told["data"] == "measured_data:batches"
    )
    import measured_data

    net = weft.materialize(weft.load("net"), measured_data.module())
    want = measure(net, measured_data.batches(), ("gram", "fisher"), labels="given")
    got = weft.load("stats")
    assert set(got) == set(want) and all(torch.equal(got.tensor(k), want.tensor(k)) for k in want)
    assert (
        typed(monkeypatch, "net", "lossy", *own, "--what", "gradient", "--loss", "measured_data:squares") == 0
    )
    assert "lossy: gradient of 12 examples, 4 tensors" in capsys.readouterr().out
    assert typed(monkeypatch, "net", "blocks", *own, "--by-block", "-q", "--only", "*.weight") == 0
    by_block = weft.load("blocks")
    torch.testing.assert_close(by_block.tensor("gram/2.weight"), want.tensor("gram/2.weight"))
    assert typed(monkeypatch, "net", "few", *own, "--samples", "99") == 0
    assert "note: 99 examples were asked for, but the data hold 12" in capsys.readouterr().err
    units = ("--what", "node", "--units", "0.weight=5")
    assert typed(monkeypatch, "net", "nodes", *own, *units) == 0
    assert weft.load("nodes").info("node/0.weight").shape == (1,)
    weft.merge(["net", "net"], "fisher", statistics=["stats", "stats"])


def test_texts_of_a_language_model(here, monkeypatch, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    torch.manual_seed(0)
    logging.disable_progress_bar()
    LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )).save_pretrained(here / "llm")  # fmt: skip
    (here / "t.txt").write_text("some words, and a few more of them")
    short = ("--texts", "t.txt", "--length", "8", "--batch", "2")
    assert typed(monkeypatch, "llm", "s", *short, "--what", "gram,fisher,sensitivity", "--samples", "3") == 0
    assert "s: fisher, gram, sensitivity of 3 examples" in capsys.readouterr().out
    assert typed(monkeypatch, "llm", "b", *short, "--by-block", "--samples", "3") == 0
    one, other = weft.load("s"), weft.load("b")
    for key in other:
        torch.testing.assert_close(one.tensor(key), other.tensor(key))


def test_what_is_wrong_is_said(here, monkeypatch, capsys):
    own = ("--data", "measured_data:batches", "--module", "measured_data:module")
    for words, why in (
        (("net", "o"), "--data PKG:FN or --texts FILE, one of both"),
        (("net", "o", *own, "--labels", "mine"), "--labels is model, exact, given, not 'mine'"),
        (("net", "o", *own, "--units", "0.weight"), "--units is PATTERN=N"),
        (("net", "o", *own, "--what", "grams"), "no statistic 'grams'; did you mean 'gram'"),
        (("net", "o", "--data", "measured_data:batches"), "has no config.json"),
    ):
        assert typed(monkeypatch, *words) == 2
        assert why in capsys.readouterr().err
        assert not Path("o").exists()
