"""Perplexity against sums written out one token at a time."""

import gzip
import json
import math

import pytest
import torch
from hf_models import BYTES, TEXT, tiny, written
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
from weft.errors import DataError, UsageError
from weft.llm.perplexity import (
    Score,
    is_causal,
    perplexity,
    read_texts,
    score,
    score_ids,
    tokens_of,
    unigram_perplexity,
    windows,
)

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return tiny("LlamaForCausalLM", **BYTES)


def by_hand(model, texts, window, stride):
    """Σ −log p and the count, one token at a time: token i sees from where its window begins."""
    nll, count = 0.0, 0
    for ids in texts:
        for i in range(1, len(ids)):
            # windows end at w, w+s, w+2s …; the token is scored in the first that holds it
            stop = window if i < window else window + math.ceil((i + 1 - window) / stride) * stride
            start = max(0, min(stop, len(ids)) - window)
            with torch.no_grad():
                logits = model.double()(torch.tensor([ids[start:i]])).logits[0, -1]
            nll -= torch.log_softmax(logits, -1)[ids[i]].item()
            count += 1
    model.float()
    return nll, count


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (5, 1), (64, 32)])
def test_equals_the_sum_by_hand(model, window, stride):
    texts = [list(b"the quick brown fox jumps"), list(b"over"), list(b"x"), list(b"the lazy dog, again")]
    found = score_ids(model, texts, window=window, stride=stride, batch=3)
    nll, count = by_hand(model, texts, window, stride)
    assert found.tokens == count == sum(max(0, len(t) - 1) for t in texts)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)


@given(st.integers(0, 60), st.integers(2, 12), st.data())
@settings(deadline=None, max_examples=200)
def test_every_token_but_the_first_is_scored_once_with_context(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    scored = []
    for start, stop, n in windows(length, window, stride):
        assert 0 <= start < stop - n and stop <= length and stop - start <= window
        assert start == 0 or stop - start == window  # never less context than there could be
        scored += range(stop - n, stop)
    assert scored == list(range(1, length))


def test_batches_change_nothing_but_rounding(model):
    text = "It rained all night, and in the morning the river was over the road. " * 5
    one = score(model, text, window=16, batch=1)
    for batch in (2, 7, 64):
        many = score(model, text, window=16, batch=batch)
        assert many.tokens == one.tokens and many.nll == pytest.approx(one.nll, rel=1e-6)


def test_tokens_weigh_the_same_in_long_and_short_texts(model):
    long, short = "a long text about nothing at all", "short!"
    a, b, both = (score(model, t) for t in (long, short, [long, short]))
    assert both.tokens == a.tokens + b.tokens and both.nll == pytest.approx(a.nll + b.nll, rel=1e-6)
    assert both.perplexity != pytest.approx((a.perplexity + b.perplexity) / 2, rel=1e-4)


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary(model):
    uniform = tiny("LlamaForCausalLM", **BYTES)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    assert perplexity(uniform, "whatever there is") == pytest.approx(256)


def test_any_module_from_ids_to_logits():
    class Successor(torch.nn.Module):
        """Is sure that each byte is followed by the next one."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(256, 256)
            self.table.weight.data = 100 * torch.eye(256).roll(1, 1)

        def forward(self, ids):
            return self.table(ids)

    assert perplexity(Successor(), "abcdefgh") == pytest.approx(1)
    assert perplexity(Successor(), "aaaa") == pytest.approx(math.exp(100))


def test_a_checkpoint_brings_its_tokenizer(tmp_path):
    from test_hf import word_tokenizer

    model = tiny("LlamaForCausalLM", **TEXT)
    folder = written(model, tmp_path / "m")
    text = "one two two one three two"
    by_bytes = perplexity(weft.load(folder), text)
    assert by_bytes == pytest.approx(score_ids(model, [[b % 64 for b in text.encode()]]).perplexity, rel=1e-6)
    word_tokenizer().save_pretrained(folder)
    ids = [1, 2, 2, 1, 0, 2]
    assert perplexity(weft.load(folder), text) == pytest.approx(score_ids(model, [ids]).perplexity, rel=1e-6)
    assert score(weft.load(folder), [text, text], limit_tokens=8).tokens == 5 + 1


def test_limits_of_models_and_tokens(model):
    assert tokens_of(["abcdef", "ghi", "j"], None, 256, 8) == [list(b"abcdef"), list(b"gh")]
    with pytest.raises(UsageError, match="takes 64 tokens at once, not 65"):
        score(model, "text", window=65)
    for window, stride in ((1, 1), (8, 8), (8, 0)):
        with pytest.raises(UsageError, match=f"window {window}, stride {stride}"):
            score(model, "text", window=window, stride=stride)
    with pytest.raises(UsageError, match="limit_tokens is 1"):
        score(model, "text", limit_tokens=1)
    with pytest.raises(DataError, match="fewer than two tokens"):
        score(model, ["a", ""])


def test_a_tokenizer_of_another_model(model):
    with pytest.raises(DataError, match="the id 256, but the model has 256 rows"):
        score(model, "x", lambda text, **_: {"input_ids": [0, 256]})


def test_what_has_no_perplexity():
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2}  # fmt: skip
    bert = tiny("BertForMaskedLM", **config)
    assert not is_causal(bert)
    with pytest.raises(UsageError, match="BertForMaskedLM does not predict the next token"):
        perplexity(bert, "text")


def test_files(tmp_path):
    (tmp_path / "a.txt").write_text("né\nb")
    assert read_texts(tmp_path / "a.txt") == ["né\nb"]
    lines = "\n".join(map(json.dumps, [{"text": "a"}, "b"])) + "\n\n"
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read_texts(tmp_path / "b.jsonl.gz") == ["a", "b"]
    for name, data, match in (
        ("c.txt", b"\xff\xfe", "no text in UTF-8"),
        ("d.txt.gz", b"no gzip", "no text in UTF-8"),
        ("e.jsonl", b'{"text": "a"}\n{"txt": 1}', "line 2 holds .*write"),
        ("f.jsonl", b"{", "line 1"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=match):
            read_texts(tmp_path / name)


def test_unigram_and_extremes():
    assert unigram_perplexity([[9, 1, 2, 3, 4]]) == pytest.approx(4)  # the first token isn't scored
    assert unigram_perplexity([[1, 1, 1]]) == 1
    assert Score(1e6, 1).perplexity == math.inf
    assert math.isnan(Score(math.nan, 3).perplexity)
