"""Models in one vocabulary: every row means the same token, and the models compute what they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from token_models import MORE, TEXT, byte_level, llama, logits, metaspace, permuted, write

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany, asset
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError
from weft.llm.tokens.share import check_same, share_vocabulary
from weft.llm.tokens.sources import TokenRule
from weft.llm.tokens.tables import tables

E, H = "model.embed_tokens.weight", "lm_head.weight"


def toy(
    words: dict[str, int], rows: int, seed: int, tied: bool = False, kind: str = "BPE", **config: Any
) -> Checkpoint:
    """An embedding and a head of random numbers with a tokenizer.json."""
    g = torch.Generator().manual_seed(seed)
    state = {E: torch.randn((rows, 4), generator=g)} | (
        {} if tied else {H: torch.randn((rows, 4), generator=g)}
    )
    if tied:
        state[H] = state[E]
    data = {
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": kind, "vocab": words, "merges": []},
    }
    config = {"vocab_size": rows, "tie_word_embeddings": tied, **config}
    files = (
        asset("tokenizer.json", json.dumps(data).encode()),
        asset("generation_config.json", b'{"eos_token_id": 1}'),
    )
    return InCompany(StateDict(state, f"toy{seed}"), config, files)


def words_of(model: Checkpoint) -> dict[str, int]:
    data = json.loads(next(a for a in model.assets if a.name == "tokenizer.json").read())
    return data["model"]["vocab"] | {t["content"]: t["id"] for t in data["added_tokens"]}


A = {"a": 0, "b": 1, "c": 2}
B = {"c": 0, "a": 1, "x": 2, "y": 3}
C = {"y": 0, "z": 1, "a": 2}


def test_union_without_a_base() -> None:
    """Own rows; the only holder's; the mean of holders. Numbers: the first model's, then the others' in order."""
    a, b, c = models = [toy(A, 3, 1), toy(B, 4, 2), toy(C, 3, 3)]
    made = share_vocabulary(models)
    assert [words_of(m) for m in made] == [{"a": 0, "b": 1, "c": 2, "x": 3, "y": 4, "z": 5}] * 3
    for name in (E, H):
        ra, rb, rc = (m.tensor(name).double() for m in models)
        ba, bb, bc = ra[1], rb[2], rc[1]  # b, x and z have one holder
        y = (rb[3] + rc[0]) / 2
        expected = [
            torch.stack([ra[0], ba, ra[2], bb, y, bc]),
            torch.stack([rb[1], ba, rb[0], bb, rb[3], bc]),
            torch.stack([rc[2], ba, (ra[2] + rb[0]) / 2, bb, rc[0], bc]),
        ]
        for m, want in zip(made, expected, strict=True):
            assert torch.allclose(m.tensor(name).double(), want, atol=1e-15)
            assert m.info(name).shape == (6, 4)
    assert all(m.config["vocab_size"] == 6 for m in made if m.config)
    assert a.tensor(E).shape == (3, 4) and b is models[1] and c is models[2]


def test_the_base_goes_first() -> None:
    models = [toy(A, 3, 1), toy(B, 4, 2), toy(C, 3, 3)]
    made = share_vocabulary(models, base=1)
    assert list(words_of(made[0])) == ["c", "a", "x", "y", "b", "z"]
    assert torch.equal(
        made[0].tensor(E)[3], models[1].tensor(E)[3].to(made[0].tensor(E).dtype)
    )  # y: not the mean
    assert torch.equal(made[2].tensor(E)[0].float(), models[1].tensor(E)[0])  # c


def test_one_models_vocabulary() -> None:
    models = [toy(A, 3, 1), toy(B, 4, 2)]
    one, two = share_vocabulary(models, 1)
    assert words_of(one) == B and torch.equal(two.tensor(E), models[1].tensor(E))
    want = torch.stack(
        [models[0].tensor(E)[2], models[0].tensor(E)[0], models[1].tensor(E)[2], models[1].tensor(E)[3]]
    )
    assert torch.equal(one.tensor(E), want)


def test_rules_for_single_tokens() -> None:
    models = [toy(A, 3, 1), toy(B, 4, 2), toy(C, 3, 3)]
    rules = {
        "y": TokenRule(2), "b": TokenRule(1, "x", force=True), "x": TokenRule(None), "z": TokenRule(0, 2),
        "c": TokenRule(force=True, given=False),
    }  # fmt: skip
    made = share_vocabulary(models, base=0, tokens=rules)
    number = words_of(made[0])
    row = {t: [m.tensor(E)[i].float() for m in made] for t, i in number.items()}
    ra, rb, rc = (m.tensor(E) for m in models)
    assert [torch.equal(r, w) for r, w in zip(row["y"], [rc[0], rb[3], rc[0]], strict=True)] == [True] * 3
    assert all(torch.equal(r, rb[2]) for r in row["b"])  # forced on all
    assert torch.equal(row["x"][0], torch.zeros(4)) and torch.equal(row["x"][1], rb[2])
    assert torch.equal(row["z"][1], ra[2]) and torch.equal(row["z"][2], rc[1])
    assert all(torch.equal(r, ra[2]) for r in row["c"])  # forced to the usual source, the base
    with pytest.raises(DataError, match=r"'nothing' is not in the result's vocabulary"):
        share_vocabulary(models, tokens={"nothing": TokenRule(0)})
    with pytest.raises(
        DataError, match=r"(?s)'x': toy1 has no row for the token 'x'.*'y': toy2 has no row for the token 17"
    ):
        share_vocabulary(models, tokens={"x": TokenRule(0), "y": TokenRule(1, 17)})


def test_padding_is_kept_unless_asked() -> None:
    a, b = toy(A, 8, 1), toy(A | {"d": 3}, 8, 2)
    one, two = share_vocabulary([a, b], 0)
    assert torch.equal(one.tensor(E), a.tensor(E))
    assert torch.equal(two.tensor(E)[4:], b.tensor(E)[4:])
    # 3 is padding in the result but a token of b's: the other one's padding instead
    assert torch.equal(two.tensor(E)[3], a.tensor(E)[3])
    assert share_vocabulary([a, b], 0, keep_padding=False)[0].info(E).shape == (3, 4)


def test_padding_to_a_multiple_is_the_mean() -> None:
    models = [toy(A, 3, 1), toy(B, 4, 2)]
    made = share_vocabulary(models, pad_to_multiple_of=4)
    for m in made:
        values = m.tensor(E).double()
        assert values.shape == (8, 4) and m.config and m.config["vocab_size"] == 8
        assert torch.allclose(values[5:], values[:5].mean(0).expand(3, 4), atol=1e-12)
    assert share_vocabulary([toy(A, 8, 1)], 0, pad_to_multiple_of=2)[0].info(E).shape == (4, 4)
    with pytest.raises(UsageError, match="at least 1"):
        share_vocabulary(models, pad_to_multiple_of=0)


def test_a_token_without_a_row_counts_as_missing() -> None:
    a, b = toy(A, 2, 1), toy(A, 3, 2)
    one, _ = share_vocabulary([a, b], 1)
    assert torch.equal(one.tensor(E)[2], b.tensor(E)[2])


def test_a_tied_model_gives_its_embedding_as_head() -> None:
    tied, untied = toy(A, 3, 1, tied=True), toy(B, 4, 2)
    one, two = share_vocabulary([tied, untied])
    assert one.aliases == {H: E} and H not in one
    assert torch.equal(two.tensor(H)[4].float(), untied.tensor(H)[3])
    assert torch.equal(two.tensor(H)[1].float(), tied.tensor(E)[1])  # b: from what the head is tied to


def test_numbers_in_the_config_keep_their_meaning() -> None:
    a = toy(
        A,
        3,
        1,
        eos_token_id=1,
        pad_token_id=[0, 2],
        image_token_index=2,
        text_config={"vocab_size": 3, "bos_token_id": 0},
    )
    b = toy(B, 4, 2, eos_token_id=3)
    one, _ = share_vocabulary([a, b], 1)
    assert one.config == {
        "vocab_size": 4, "tie_word_embeddings": False, "eos_token_id": 3, "pad_token_id": [1, 0],
        "image_token_index": 0, "text_config": {"vocab_size": 4, "bos_token_id": 1},
    }  # fmt: skip
    made = json.loads(next(x for x in one.assets if x.name == "generation_config.json").read())
    assert made == {"eos_token_id": 1}  # b's own generation config has it
    assert share_vocabulary([a, b])[0].config["eos_token_id"] == 1  # type: ignore[index]


def test_kinds_are_not_mixed_unless_forced() -> None:
    a = toy({"Ġa": 0, "b": 1, "c": 2}, 3, 1)
    files = (asset("tokenizer.json", metaspace(300).to_str().encode()),)
    b = InCompany(
        StateDict({E: torch.randn(300, 4), H: torch.randn(300, 4)}, "spm"), {"vocab_size": 300}, files
    )
    with pytest.raises(UsageError, match=r"spm has a sentencepiece tokenizer, toy1 a byte-level one"):
        share_vocabulary([a, b])
    assert share_vocabulary([a, b], force=True)[0].info(E).shape[0] > 300


def test_models_that_cannot_be_brought_together() -> None:
    a = toy(A, 3, 1)
    with pytest.raises(DataError, match="bare has no tokenizer"):
        share_vocabulary([a, StateDict({E: torch.randn(3, 4)}, "bare")])
    wide = InCompany(
        StateDict({E: torch.randn(3, 6), H: torch.randn(3, 6)}, "wide"), {"vocab_size": 3}, a.assets
    )
    with pytest.raises(DataError, match=r"row has shape \[4\] in toy1, \[6\] in wide"):
        share_vocabulary([a, wide])
    odd = InCompany(StateDict({E: torch.randn(3, 6)}, "odd"), {"vocab_size": 7}, a.assets)
    with pytest.raises(
        DataError, match=r"config.json says vocab_size 7, no embedding .*embed_tokens.weight \[3, 6\]"
    ):
        share_vocabulary([odd])


def test_rows_are_never_matched_by_number() -> None:
    a, b = toy(A, 3, 1), toy(B, 4, 2)
    with pytest.raises(
        DataError,
        match=r"embed_tokens.weight: 3 rows in toy1, 4 rows .*: set tokenizer_source: base \| union",
    ):
        check_same([a, b])
    with pytest.raises(DataError, match=r"token 0 is 'a' in toy1 and 'y' in toy2"):
        check_same([a, toy(C, 3, 2)])
    check_same([a, toy(A, 3, 4)])
    check_same([a, toy({"a": 0, "b": 1}, 3, 4)])  # a token fewer is no contradiction


def test_tables() -> None:
    """Embeddings and heads, their biases, a bias with an axis before it; not positions, not a tower's."""
    state = {
        "model.shared.weight": (20, 4), "model.encoder.embed_positions.weight": (20, 4), "lm_head.weight": (20, 4),
        "lm_head.bias": (20,), "final_logits_bias": (1, 20), "vision_tower.embed.weight": (20, 4),
        "model.layers.0.mlp.weight": (20, 4),
    }  # fmt: skip
    model = InCompany(StateDict({n: torch.randn(s) for n, s in state.items()}), {"vocab_size": 20})
    found = tables(model)
    assert found.rows == 20
    assert set(found.names) == {
        "model.shared.weight", "lm_head.weight", "lm_head.bias", "final_logits_bias",
    }  # fmt: skip
    assert found.lead("final_logits_bias") == (1,) and found.width("lm_head.bias") == ()


def test_a_large_union_is_planned_quickly() -> None:
    import time

    n = 128_000
    g = np.random.default_rng(0).permutation(n)
    one = {f"t{i}": i for i in range(n)}
    two = {f"t{i}": int(g[i]) for i in range(n - 100)} | {f"u{i}": int(g[n - 100 + i]) for i in range(100)}
    models = [toy(one, n, 1), toy(two, n, 2)]
    began = time.perf_counter()
    made = share_vocabulary(models)
    seconds = time.perf_counter() - began
    assert made[0].info(E).shape == (n + 100, 4)
    assert torch.equal(made[1].tensor(E)[:100].float(), models[1].tensor(E)[torch.from_numpy(g[:100])])
    assert seconds < 10  # a loop over tokens and models in tensors would take minutes


# -- the real thing ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, a fine-tune with a longer vocabulary, and one whose numbers are shuffled."""
    folder = tmp_path_factory.mktemp("family")
    small, large, other = byte_level(300), byte_level(320), permuted(byte_level(300), 3, keep=2)
    large.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    base = llama(300, 0)
    models = {"base": base, "large": llama(322, 1, like=base), "other": llama(300, 2, like=base, tied=False)}
    toks = {"base": small, "large": large, "other": other}
    paths = {n: write(folder / n, toks[n], m) for n, m in models.items()}
    return {"paths": paths, "models": models, "tokenizers": toks, "folder": folder}


def averaged(family: dict[str, Any], names: list[str], rows: dict[str, list[int]]) -> torch.nn.Module:
    """The reference: state dicts with rows put in order by hand, averaged in float64."""
    states = []
    for name in names:
        state = {n: t.double() for n, t in family["models"][name].state_dict().items()}
        states.append(state | {n: state[n][rows[name]] for n in (E, H)})
    mean = {n: torch.stack([s[n] for s in states]).mean(0).float() for n in states[0]}
    made = llama(len(rows[names[0]]))
    made.load_state_dict(mean)
    return made.eval()


@pytest.mark.parametrize("source", ["base", "union"])
def test_a_merge_computes_what_the_reindexed_models_do(
    family: dict[str, Any], source: str, tmp_path: Path
) -> None:
    """Shuffled numbers: the logits of the merge are those of a reference put in order by hand."""
    paths, toks = family["paths"], family["tokenizers"]
    recipe = {
        "merge_method": "linear", "models": [paths["base"], paths["other"]], "base_model": paths["base"],
        "tokenizer_source": source,
    }  # fmt: skip
    weft.save(weft.build(recipe), tmp_path / "out")
    order = [toks["other"].token_to_id(toks["base"].id_to_token(i)) for i in range(300)]
    assert order != list(range(300))
    reference = averaged(family, ["base", "other"], {"base": list(range(300)), "other": order})
    ids = toks["base"].encode("the cat and the words of the world").ids
    with torch.no_grad():
        want = reference(torch.tensor([ids])).logits[0]
    assert torch.allclose(logits(tmp_path / "out", ids), want, atol=1e-5)


def test_the_union_loads_in_transformers(family: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    paths, toks = family["paths"], family["tokenizers"]
    recipe = {
        "merge_method": "linear",
        "models": [paths["other"], paths["large"]],
        "tokenizer_source": "union",
    }
    weft.save(weft.build(recipe), tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = loaded.get_vocab()
    new = [
        t
        for t, _ in sorted(toks["large"].get_vocab().items(), key=lambda e: e[1])
        if t not in toks["other"].get_vocab()
    ]
    assert ids == toks["other"].get_vocab() | {t: 300 + i for i, t in enumerate(new)} and len(new) == 22
    assert loaded.convert_tokens_to_ids("<|im_end|>") == ids["<|im_end|>"] == 321
    # the longer one's merges come with its tokens: text is split as it splits it, under the other's numbers
    text = "<|im_start|>the cat sat on the mat and the dog sat on the log, naïve Zürich<|im_end|>"
    tokens = [toks["large"].id_to_token(i) for i in toks["large"].encode(text).ids]
    assert loaded.convert_ids_to_tokens(loaded(text, add_special_tokens=False)["input_ids"]) == tokens
    assert any(t in new and not t.startswith("<") for t in tokens)
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    # logits of shared tokens after shared tokens: the reference has both embeddings in the union's order
    by_id = {i: t for t, i in ids.items()}
    rows = {
        "large": [toks["large"].token_to_id(by_id[i]) for i in range(322)],
        "other": [toks["other"].token_to_id(by_id[i]) for i in range(300)] + [0] * 22,
    }
    states = {
        n: {k: v.double() for k, v in family["models"][n].state_dict().items()} for n in ("other", "large")
    }
    mean = {}
    for name, value in states["large"].items():
        other = states["other"][name]
        if name in (E, H):
            value, other = value[rows["large"]], other[rows["other"]].clone()
            other[300:] = value[300:]
        mean[name] = ((value + other) / 2).float()
    reference = llama(322)
    reference.load_state_dict(mean)
    asked = loaded(text)["input_ids"]
    with torch.no_grad():
        want = reference(torch.tensor([asked])).logits[0]
    assert torch.allclose(logits(tmp_path / "out", asked), want, atol=1e-5)


def test_added_tokens_of_an_unrelated_tokenizer(tmp_path: Path) -> None:
    """No nesting: the tokens are added ones, numbered as the library numbers them."""
    from transformers import AutoTokenizer

    one, two = metaspace(310), metaspace(330, TEXT[:2] + MORE)
    base = llama(310)
    paths = [write(tmp_path / "a", one, base), write(tmp_path / "b", two, llama(330, 1, like=base))]
    weft.save(
        weft.build({"merge_method": "linear", "models": paths, "tokenizer_source": "union"}), tmp_path / "out"
    )
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    made = loaded.get_vocab()
    assert {t: made[t] for t in one.get_vocab()} == one.get_vocab()
    assert set(made) == set(one.get_vocab()) | set(two.get_vocab())
    assert weft.load(tmp_path / "out").info(E).shape[0] == len(made) == max(made.values()) + 1


def test_two_runs_give_the_same_bytes(family: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the hash seed of the process."""
    import hashlib
    import os
    import subprocess
    import sys

    paths = family["paths"]
    recipe = tmp_path / "r.yml"
    recipe.write_text(json.dumps({
        "merge_method": "linear", "models": [paths["other"], paths["large"], paths["base"]],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 64}, "chat_template": "chatml",
    }))  # fmt: skip
    seen = set()
    for seed in ("0", "1"):
        out = tmp_path / seed
        subprocess.run(
            [sys.executable, "-m", "weft.cli.main", "merge", str(recipe), str(out), "-q"],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, timeout=120,
        )  # fmt: skip
        files = sorted(f for f in out.rglob("*") if f.is_file())
        seen.add(hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest())
        assert {f.name for f in files} >= {"tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert len(seen) == 1
