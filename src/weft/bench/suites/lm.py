"""`lm` and `lora`: a byte-level GPT and five corpora, perplexity of a byte; `lora` has adapters of rank 8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.bench.cache import code, stored
from weft.bench.networks import GPT, Block
from weft.bench.suite import Suite, Task, device
from weft.bench.suites.data import corpus, data_folder, digest, permutation
from weft.bench.training import Family, Fit, joined

CORPORA = ("shakespeare", "gsm8k_math", "spanish_quijote", "recipes", "python_mbpp")
UNSEEN = ("tinystories",)
LENGTH = 64
FEW, VALIDATION, TRAIN, TEST = 800, 100, 3000, 300
BASE = Fit(epochs=3, lr=2e-3, batch=32)
EXPERT = Fit(epochs=2, lr=1e-3, batch=32)
LORA = Fit(epochs=2, lr=4e-3, batch=32)
RANK = 8


@cache
def windows(folder: Path, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """few, validation, train, test: bytes [n, 64] and those that follow them."""
    found = corpus(folder, f"lm_{name}")
    train, test = (_cut(found[p]) for p in ("train", "test"))
    order = torch.from_numpy(permutation(len(train)))
    cuts = (0, FEW, FEW + VALIDATION, FEW + VALIDATION + TRAIN)
    made = {
        part: _pairs(train[order[a:b]])
        for part, a, b in zip(("few", "validation", "train"), cuts, cuts[1:], strict=False)
    }
    return made | {"test": _pairs(test[torch.from_numpy(permutation(len(test)))][:TEST])}


def _cut(text: str) -> Tensor:
    """Windows of LENGTH + 1 bytes, one after the other."""
    raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return raw[: len(raw) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def family(folder: Path) -> Family:
    """One vocabulary for all: nothing is frozen, every column counts."""
    about = {
        "files": digest(folder, tuple(f"lm_{c}" for c in CORPORA)),
        "sizes": [FEW, VALIDATION, TRAIN],
        "t": LENGTH,
    }
    return Family(
        "gpt",
        GPT,
        dict.fromkeys(CORPORA, (0, 256)),
        BASE,
        EXPERT,
        about,
        (GPT, Block),
        frozen=(),
        grouped=False,
    )


def lm(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """Plays, sums, Spanish, recipes, Python."""
    folder = data_folder(data)
    of = family(folder)
    found = {c: windows(folder, c) for c in CORPORA}
    base = of.pretrained(lambda: {c: found[c]["few"] for c in CORPORA}, seed, say)
    experts = {c: of.tuned(base, c, lambda c=c: found[c]["train"], seed, say) for c in CORPORA}  # type: ignore[misc]
    joint = of.tuned(base, "joint", lambda: joined([found[c]["train"] for c in CORPORA]), seed, say, EXPERT)
    return _suite("lm", folder, base, experts, seed, joint)


def lora(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """The same base, an adapter of rank 8 on every linear layer a corpus."""
    folder = data_folder(data)
    of = family(folder)
    found = {c: windows(folder, c) for c in CORPORA}
    base = of.pretrained(lambda: {c: found[c]["few"] for c in CORPORA}, seed, say)

    def adapted(c: str) -> dict[str, Tensor]:
        about = {
            "corpus": c, "seed": seed, "settings": asdict(LORA), "rank": RANK, "base": asdict(of.base),
            "data": of.about, "code": code(GPT, Block, _adapted),
        }  # fmt: skip

        def make() -> dict[str, Tensor]:
            say(f"training the adapter of {c} of seed {seed}")
            return _adapted(base, found[c]["train"], LORA, seed)

        return stored(f"gpt-lora-{c}", about, make)

    return _suite("lora", folder, base, {c: adapted(c) for c in CORPORA}, seed, None)


def _adapted(base: dict[str, Tensor], data: tuple[Tensor, Tensor], how: Fit, seed: int) -> dict[str, Tensor]:
    import weft

    module = GPT()
    module.load_state_dict(base)
    found = weft.finetune(
        module.to(device()), data, mode="lora", which="linear", freeze=["head.*"], lora={"rank": RANK},
        epochs=how.epochs, batch=how.batch, lr=how.lr,
        warmup=min(how.warmup, how.epochs * -(-len(data[1]) // how.batch)), seed=seed,
    )  # fmt: skip
    return dict(found.checkpoint.state_dict())


def _suite(
    name: str, folder: Path, base: dict[str, Tensor], experts: dict[str, Any], seed: int, joint: Any
) -> Suite:
    def task(c: str) -> Task:
        parts = windows(folder, c)
        return Task(c, {p: parts[p] for p in ("train", "validation", "test")}, metric="perplexity")

    unseen = [Task(c, {"test": windows(folder, c)["test"]}, metric="perplexity") for c in UNSEEN]
    kind = "adapters of rank 8 on every linear layer of the blocks" if name == "lora" else "all weights tuned"
    return Suite(
        name, GPT, [task(c) for c in CORPORA], experts, base, unseen, joint, seed=seed,
        about=f"A byte-level GPT of 0.2 M weights, five corpora (plays, sums, Spanish, recipes, Python), {kind}. "
        "Perplexity of a byte: lower is better.",
    )  # fmt: skip
