"""A model with another model's tokenizer: exact where the tokens are known, approximated where they are not."""

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
from weft.llm.tokens.omp import omp
from weft.llm.tokens.transplant import METHODS, transplant

E, H = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("transplant")
    tok, large = byte_level(300), byte_level(340, TEXT + MORE)
    base = llama(300)
    return {
        "model": write(folder / "model", tok, base),
        "shuffled": write(folder / "shuffled", permuted(tok, 3), llama(300, 5)),
        "large": write(folder / "large", large, llama(352, 6, eos_token_id=1)),
        "spm": write(folder / "spm", metaspace(320), llama(320, 7, bos_token_id=1, eos_token_id=2)),
        "tied": write(folder / "tied", large, llama(340, 8, tied=True)),
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_permuted_vocabulary_is_exact(folders: dict[str, str], method: str, tmp_path: Path) -> None:
    """Every token is known, so that the logits are the model's, in the new order, whatever the method."""
    model, donor = weft.load(folders["model"]), weft.load(folders["shuffled"])
    made = transplant(model, donor, method)
    assert (made.report.exact, made.report.approximated) == (300, 0)
    if method != "omp":
        old = json.loads((Path(folders["model"]) / "tokenizer.json").read_text())["model"]["vocab"]
        new = json.loads((Path(folders["shuffled"]) / "tokenizer.json").read_text())["model"]["vocab"]
        order = torch.empty(300, dtype=torch.int64)
        for token, i in new.items():
            order[i] = old[token]
        assert torch.equal(made.checkpoint.tensor(E), model.tensor(E)[order])
        return
    weft.save(made.checkpoint, tmp_path / "out")
    from transformers import AutoTokenizer

    text = "the cat and the dog, naïve"
    one, two = (AutoTokenizer.from_pretrained(f) for f in (folders["model"], tmp_path / "out"))
    ids, again = (t(text, add_special_tokens=False)["input_ids"] for t in (one, two))
    assert ids != again and one.convert_ids_to_tokens(ids) == two.convert_ids_to_tokens(again)
    was, now = logits(folders["model"], ids), logits(tmp_path / "out", again)
    order = torch.tensor(one.convert_tokens_to_ids(two.convert_ids_to_tokens(list(range(300)))))
    assert torch.equal(now, was[:, order])


def test_omp_rows_by_hand(folders: dict[str, str]) -> None:
    """e(t) = Σ c_j e(j) with c from the donor's embedding alone, for embedding and head apart."""
    model, donor = weft.load(folders["model"]), weft.load(folders["large"])
    made = transplant(model, donor, k=8, dtype=torch.float64)
    vocab = json.loads((Path(folders["model"]) / "tokenizer.json").read_text())["model"]["vocab"]
    theirs = json.loads((Path(folders["large"]) / "tokenizer.json").read_text())["model"]["vocab"]
    shared = [
        (i, vocab[t])
        for t, i in sorted(theirs.items(), key=lambda e: e[1])
        if t in vocab and t not in ("<s>", "</s>")
    ]
    new = [i for t, i in sorted(theirs.items(), key=lambda e: e[1]) if t not in vocab]
    assert made.report.approximated == len(new) > 20 and made.report.shared == len(shared)
    rows = torch.tensor([s[0] for s in shared]), torch.tensor([s[1] for s in shared])
    for name in (E, H):
        atoms, target = donor.tensor(name).double()[rows[0]], donor.tensor(name).double()[new]
        found = omp(target, atoms, 8)
        ours = model.tensor(name).double()[rows[1]]
        want = torch.stack([c @ ours[i] for c, i in zip(found.coefficient, found.index, strict=True)])
        assert torch.allclose(made.checkpoint.tensor(name).double()[new], want, atol=1e-9)
        known = made.checkpoint.tensor(name).double()[rows[0]]
        assert torch.equal(known, ours)
        assert made.report.error[name] == pytest.approx(float(found.error.mean()))
    assert made.checkpoint.info(E).shape[0] == 340  # the donor's padding is not taken over


def test_a_donor_that_is_a_turned_copy_is_recovered(folders: dict[str, str], tmp_path: Path) -> None:
    """With as many atoms as dimensions OMP is exact for any linear relation between the two spaces."""
    model = weft.load(folders["model"])
    g = torch.Generator().manual_seed(0)
    turn = torch.randn((32, 32), generator=g, dtype=torch.float64)
    donor = InCompany(
        StateDict({n: model.tensor(n).double() @ turn for n in (E, H)}, "turned"), model.config, model.assets
    )
    half = byte_level(280)
    small = InCompany(
        StateDict({n: model.tensor(n)[:280] for n in (E, H)}, "small"), {"vocab_size": 280},
        (asset("tokenizer.json", half.to_str().encode()),),
    )  # fmt: skip
    made = transplant(small, donor, k=32, dtype=torch.float64)
    assert made.report.approximated == 20
    assert torch.allclose(made.checkpoint.tensor(E).double(), model.tensor(E).double(), atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("donor", ["large", "spm", "tied"])
def test_every_method_loads_and_runs(
    folders: dict[str, str], method: str, donor: str, tmp_path: Path
) -> None:
    made = transplant(
        weft.load(folders["model"]), weft.load(folders[donor]), method, k=4, pad_to_multiple_of=100
    )
    report = made.report
    assert report.exact + report.by_bytes + report.by_role + report.approximated == report.tokens
    if donor == "spm":
        assert report.by_bytes > 30 and report.exact == 2 and made.checkpoint.config["eos_token_id"] == 2  # type: ignore[index]
    assert made.checkpoint.info(E).shape[0] == 400 == made.checkpoint.config["vocab_size"]  # type: ignore[index]
    n = weft.load(folders[donor]).config["vocab_size"] if donor != "large" else 340  # type: ignore[index]
    values = made.checkpoint.tensor(E).double()
    assert torch.isfinite(values).all()
    assert torch.allclose(values[n:], values[:n].mean(0).expand(400 - n, 32), atol=1e-6)
    if method == "omp":
        from transformers import AutoTokenizer

        weft.save(made.checkpoint, tmp_path / "out")
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat sat")["input_ids"]
        assert torch.isfinite(logits(tmp_path / "out", ids)).all()


def test_pieces_are_the_models_own(folders: dict[str, str]) -> None:
    model, donor = weft.load(folders["model"]), weft.load(folders["large"])
    made = transplant(model, donor, "pieces").checkpoint
    theirs = json.loads((Path(folders["large"]) / "tokenizer.json").read_text())["model"]["vocab"]
    ours = json.loads((Path(folders["model"]) / "tokenizer.json").read_text())["model"]["vocab"]
    token = next(t for t in theirs if t not in ours and len(t) == 2)  # made of two letters, each a token
    want = (model.tensor(E)[ours[token[0]]].double() + model.tensor(E)[ours[token[1]]].double()) / 2
    assert torch.allclose(made.tensor(E)[theirs[token]].double(), want, atol=1e-7)


def test_a_tied_model_keeps_one_table(folders: dict[str, str], tmp_path: Path) -> None:
    made = transplant(weft.load(folders["tied"]), weft.load(folders["model"])).checkpoint
    assert H not in made and made.aliases == {H: E}
    weft.save(made, tmp_path / "out")
    assert logits(tmp_path / "out", [3, 4]).shape == (2, 300)


def test_a_bias_follows_its_head() -> None:
    """A row of a bias is the same combination as the head's row."""
    words, more = {f"t{i}": i for i in range(12)}, {f"t{i}": i for i in range(12)} | {"new": 12}
    g = torch.Generator().manual_seed(0)

    def model(vocab: dict[str, int], seed: str) -> Checkpoint:
        n = len(vocab)
        state = {
            E: torch.randn((n, 4), generator=g),
            H: torch.randn((n, 4), generator=g),
            "lm_head.bias": torch.randn(n, generator=g),
        }
        files = (
            asset(
                "tokenizer.json",
                json.dumps({"model": {"type": "BPE", "vocab": vocab, "merges": []}}).encode(),
            ),
        )
        return InCompany(StateDict(state, seed), {"vocab_size": n}, files)

    ours, theirs = model(words, "ours"), model(more, "theirs")
    made = transplant(ours, theirs, k=2, dtype=torch.float64).checkpoint
    rows = made.maps[H].rows
    a, b = rows.indptr[12], rows.indptr[13]
    assert b - a == 2
    want = rows.coefficient[a:b] @ ours.tensor("lm_head.bias").double().numpy()[rows.row[a:b]]
    assert np.isclose(float(made.tensor("lm_head.bias")[12]), want)


def test_what_cannot_be_done(folders: dict[str, str]) -> None:
    model = weft.load(folders["model"])
    with pytest.raises(UsageError, match="there is no method 'opm'; did you mean 'omp'"):
        transplant(model, model, "opm")
    with pytest.raises(UsageError, match="k must be at least 1"):
        transplant(model, model, k=0)
    files = (
        asset(
            "tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"\xe2\x98\x83\xe2\x98\x83": 0}}}'
        ),
    )
    strange = InCompany(StateDict({E: torch.randn(1, 4)}, "strange"), {"vocab_size": 1}, files)
    with pytest.raises(DataError, match="share no token, so omp has nothing to go by"):
        transplant(model, strange)
    with pytest.raises(DataError, match="bare has no tokenizer"):
        transplant(StateDict({E: torch.randn(3, 4)}, "bare"), model)


def run(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from weft.cli.tokens import app

    made = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert made.exit_code == 0, made.output
    return made.stdout


def test_the_command_line(folders: dict[str, str], tmp_path: Path) -> None:
    told = json.loads(run("inspect", folders["large"], "--json"))
    assert (told["tokens"], told["rows"], told["rows of padding"], told["kind"]) == (
        340,
        352,
        12,
        "byte-level",
    )
    told = json.loads(run("compare", folders["model"], folders["shuffled"], "--json"))
    assert (
        told["same text"] == 300 and told["same text and number"] < 20 and "base | union" in told["verdict"]
    )
    assert "of different kinds" in run("compare", folders["model"], folders["spm"])
    out = tmp_path / "out"
    told = json.loads(run("transplant", folders["model"], folders["spm"], str(out), "--k", "4", "--json"))
    assert told["approximated"] > 0 and weft.load(out).info(E).shape[0] == 320
    with pytest.raises(UsageError, match="exists"):
        run("transplant", folders["model"], folders["spm"], str(out))
