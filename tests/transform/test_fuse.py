"""Tokens of two tokenizers side by side, and distributions put on each other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import DataError, UsageError
from weft.transform.fuse import Fused, fuse, fusechat, fused_loss, fusellm
from weft.transform.tokens import Nearest, aligned, edit_distance, pieces, plain


class Pairs:
    """Tokens are given words, cut greedily."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = sorted(set(tokens))
        self.number = {t: i for i, t in enumerate(self.tokens)}

    def encode(self, text: str, **how: Any) -> list[int]:
        found = []
        while text:
            token = max((t for t in self.tokens if text.startswith(t)), key=len)
            found.append(self.number[token])
            text = text[len(token) :]
        return found

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]

    def get_vocab(self) -> dict[str, int]:
        return self.number


class Bigram(nn.Module):
    """Logits of the next token from the last."""

    def __init__(self, tokens: int, seed: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, tokens)
        with torch.no_grad():
            self.table.weight.copy_(
                2 * torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(seed))
            )

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.table(ids)
        return out


LETTERS = list("abc ")
TEXTS = ["abc cab bac", "aab cc ba", "cab bac abc aab"]


def recursive(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, recursive(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance_is_the_recursion() -> None:
    words = ["", "a", "ab", "ba", "kitt", "sitti", "abc"]
    for a in words:
        for b in words:
            assert edit_distance(a, b) == recursive(a, b)


def test_the_same_tokens_are_beside_themselves_and_warping_is_monotone() -> None:
    tokens = ["▁the", "▁cat", "s", "▁sat"]
    assert aligned(tokens, ["Ġthe", "Ġcat", "s", "Ġsat"]) == [(0,), (1,), (2,), (3,)]
    found = aligned(["ab", "c", "abc"], ["a", "b", "c", "ab", "c"])
    flat = [j for at in found for j in at]
    assert all(a <= b for a, b in pairwise(flat)) and set(flat) == set(range(5))
    assert aligned([], ["a"]) == [] and aligned(["a", "b"], []) == [(), ()]
    assert plain("▁") == " " and plain("##ing") == "ing"


def test_warping_has_the_least_cost_of_all_paths() -> None:
    def cheapest(a: list[str], b: list[str]) -> int:
        cost = edit_distance(a[0], b[0])
        if len(a) == len(b) == 1:
            return cost
        ways = [(a[1:], b[1:]), (a[1:], b), (a, b[1:])]
        return cost + min(cheapest(x, y) for x, y in ways if x and y)

    for a, b in (
        (["ab", "c"], ["a", "bc"]),
        (["a", "bb", "c"], ["ab", "b", "cc", "c"]),
        (["abc"], ["a", "b"]),
    ):
        found = aligned(a, b)
        assert sum(edit_distance(a[i], b[j]) for i, at in enumerate(found) for j in at) == cheapest(a, b)


def test_nearest_tokens() -> None:
    nearest = Nearest({"▁the": 4, "cat": 2, "cot": 1, "dog": 3})
    assert [nearest(t) for t in ("▁the", "Ġthe", "cat", "cut", "dogs")] == [4, 4, 2, 1, 3]
    with pytest.raises(UsageError, match="empty"):
        Nearest({})
    assert pieces(["ab cd ef"], 5) == ["ab cd", " ef"] and pieces(["abcdef"], 4) == ["abcd", "ef"]


def test_one_tokenizer_under_other_numbers_gives_the_source_itself() -> None:
    ours, theirs = Pairs(LETTERS), Pairs([*LETTERS, "#", "!"])  # other numbers
    source, wrong = Bigram(6, 1), Bigram(4, 0)
    with torch.no_grad():
        source.table.weight.mul_(0.2)
        source.table.weight[
            :, [theirs.number["#"], theirs.number["!"]]
        ] = -50.0  # what the target lacks is not said
        wrong.table.weight.mul_(9)
    found = fuse((wrong, ours), [(source, theirs)], TEXTS, top=6, how="mince")
    assert found.covered == (1.0, 1.0)
    row = next(i for i in range(len(TEXTS)) if found.chosen[i, 1] == 1)
    ids = theirs.encode(TEXTS[row])
    p = source(torch.tensor([ids]))[0, :-1].softmax(-1)
    dense = torch.zeros(len(ids) - 1, 4).scatter_add_(
        1, found.tokens[row, 1 : len(ids)], found.mass[row, 1 : len(ids)]
    )
    want = torch.stack([p[:, theirs.number[t]] for t in ours.tokens], 1)
    torch.testing.assert_close(dense, want.detach(), rtol=1e-4, atol=1e-5)


def test_where_tokens_differ_the_text_speaks() -> None:
    ours, theirs = Pairs(LETTERS), Pairs([*LETTERS, "ab"])
    found = fuse((Bigram(4, 0), ours), [(Bigram(5, 1), theirs)], ["cabc"], top=4, how="mince")
    assert found.covered[0] == 1.0 and found.covered[1] < 1.0
    torch.testing.assert_close(found.mass.sum(-1)[found.present], torch.ones(int(found.present.sum())))


def test_mince_takes_the_best_and_avgce_all() -> None:
    ours = Pairs(LETTERS)
    speakers = [(Bigram(4, i), ours) for i in range(3)]
    best = fuse(speakers[0], speakers[1:], TEXTS, top=4)
    assert torch.equal(best.chosen.argmax(1), best.loss.argmin(1)) and torch.equal(
        best.chosen.sum(1), torch.ones(3)
    )
    mean = fuse(speakers[0], speakers[1:], TEXTS, top=4, how="avgce")
    torch.testing.assert_close(mean.chosen, (-mean.loss).exp().softmax(1))
    # the loss of one source, from its own probabilities
    ids = torch.tensor(ours.encode(TEXTS[1]))
    p = speakers[1][0](ids[None])[0, :-1].log_softmax(-1)
    want = -p.gather(1, ids[1:, None]).mean()
    torch.testing.assert_close(best.loss[1, 1], want.detach(), rtol=1e-5, atol=1e-6)


def test_the_objective_is_its_formula() -> None:
    ours, target = Pairs(LETTERS), Bigram(4, 0)
    found = fuse((target, ours), [(Bigram(4, 3), ours)], TEXTS, top=4)
    taught = fusellm((target, ours), [], found, weight=0.9, steps=1, lr=0.0, batch=3)
    logp = target(found.ids).log_softmax(-1)
    text, said, n = 0.0, 0.0, 0
    for i in range(len(TEXTS)):
        for t in range(1, found.ids.shape[1]):
            if found.present[i, t]:
                n += 1
                text -= float(logp[i, t - 1, found.ids[i, t]])
                said -= sum(
                    float(m * logp[i, t - 1, v])
                    for m, v in zip(found.mass[i, t], found.tokens[i, t], strict=True)
                )
    assert taught.losses[0] == pytest.approx(0.9 * text / n + 0.1 * said / n, rel=1e-5)


def test_what_cannot_be_fused_is_said() -> None:
    ours = Pairs(LETTERS)
    good, bare = (Bigram(4, 0), ours), Bigram(4, 1)
    cases: list[tuple[str, type[Exception], Any]] = [
        ("has no tokenizer", UsageError, lambda: fuse(good, [bare], TEXTS)),
        ("a dict without encode", UsageError, lambda: fuse(good, [(bare, {})], TEXTS)),
        ("must be .module, tokenizer.", UsageError, lambda: fuse(3, [], TEXTS)),
        ("mince or avgce", UsageError, lambda: fuse(good, [], TEXTS, how="best")),  # type: ignore[arg-type]
        ("list of at least one text", UsageError, lambda: fuse(good, [], "abc")),
        ("two tokens", DataError, lambda: fuse(good, [], ["a"])),
        ("no logits", UsageError, lambda: fuse((nn.Embedding(4, 4).requires_grad_(False), ours), [
            (nn.Sequential(nn.Embedding(4, 4), nn.Flatten()), ours)], TEXTS)),
        ("from 0 to 1", UsageError, lambda: fused_loss(fuse(good, [], TEXTS), 2.0)),
        ("mapping of at least one", UsageError, lambda: fusechat(good, {}, TEXTS)),
        ("did you mean 'varm'", UsageError, lambda: fusechat(good, {"a": good}, TEXTS, merge="vrm", steps=0)),
    ]  # fmt: skip
    for text, kind, call in cases:
        with pytest.raises(kind, match=text):
            call()
    with torch.no_grad():
        bare.table.weight[0] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        fuse(good, [(bare, ours)], TEXTS)


def test_varm_weighs_by_what_moved() -> None:
    base = {"w": torch.zeros(3, 4), "b": torch.zeros(2)}
    one = {"w": torch.ones(3, 4), "b": torch.ones(2)}
    two = {"w": 2 * torch.ones(3, 4), "b": torch.zeros(2)}
    merged = weft.merge([one, two], "varm", base=base)
    torch.testing.assert_close(merged.tensor("w").float(), torch.full((3, 4), 0.2 * 1 + 0.8 * 2))
    torch.testing.assert_close(
        merged.tensor("b").float(), torch.full((2,), 0.5)
    )  # one did not move: equal weights
    model = weft.merge([one, two], "varm", base=base, over="model")
    v = (12 + 2, 48)
    torch.testing.assert_close(model.tensor("b").float(), torch.full((2,), v[0] / sum(v)))


def test_fusechat_of_one_source_is_fusellm() -> None:
    ours = Pairs(LETTERS)
    pivot, source = (Bigram(4, 0), ours), (Bigram(4, 5), ours)
    both = fusechat(pivot, {"a": source}, TEXTS, steps=3, lr=1e-2, top=4)
    alone = fusellm(pivot, [source], TEXTS, steps=3, lr=1e-2, top=4)
    torch.testing.assert_close(
        both.merged.tensor("table.weight").float(), alone.checkpoint.tensor("table.weight")
    )
    assert isinstance(fuse(pivot, [source], TEXTS), Fused)


def test_checkpoints_of_transformers_come_with_their_tokenizers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    for i, (name, extra) in enumerate((("pivot", []), ("source", ["ab", "d"]))):
        words = {t: n for n, t in enumerate([*LETTERS, *extra])}
        made = Tokenizer(models.BPE(words, [("a", "b")] if extra else [], unk_token=None))
        made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        torch.manual_seed(i)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(words), hidden_size=8 + 8 * i, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        ))  # fmt: skip
        net.save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / name)
    found = fusechat(
        tmp_path / "pivot", {"a": tmp_path / "source"}, TEXTS, steps=2, lr=1e-2, top=4, merge="sce"
    )
    weft.save(found.merged, tmp_path / "merged")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "merged").config.hidden_size == 8
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    weft.save(found.taught["a"].checkpoint, tmp_path / "taught")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "taught").config.vocab_size == 4
