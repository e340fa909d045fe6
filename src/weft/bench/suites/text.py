"""`text`: five classifications of short texts, a small transformer encoder over hashed words."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.bench.networks import Block, Encoder
from weft.bench.suite import Suite, Task
from weft.bench.suites.data import data_folder, digest, lines
from weft.bench.training import Family, Fit, joined

CLASSES = {"sst2": 2, "trec6": 6, "snips7": 7, "clinc_domain10": 10, "banking77": 77}
UNSEEN = {"customer_reviews": "sst2"}
WORDS, LENGTH = 2048, 24
FEW, VALIDATION, TRAIN, TEST = 600, 300, 3000, 800
BASE = Fit(epochs=8, lr=1e-3, smoothing=0.1)
EXPERT = Fit(epochs=5, lr=5e-4, smoothing=0.1)
JOINT = Fit(epochs=2, lr=5e-4, smoothing=0.1)


def tokens(text: str) -> list[int]:
    """Words and marks as numbers 1 … WORDS − 1 by their checksum: no vocabulary to keep; padded with 0."""
    found = re.findall(r"\w+|[^\w\s]", text.lower())[:LENGTH]
    ids = [1 + zlib.crc32(w.encode()) % (WORDS - 1) for w in found] or [1]
    return ids + [0] * (LENGTH - len(ids))


@cache
def examples(folder: Path, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """few, validation, train, test: tokens [n, t] and labels [n]."""
    made = {}
    found = lines(folder, name)

    def encoded(records: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        x = torch.tensor([tokens(r["text"]) for r in records])
        return x, torch.tensor([int(r["label"]) for r in records])

    train = found["train"]
    cuts = (0, FEW, FEW + VALIDATION, FEW + VALIDATION + TRAIN)
    for part, (a, b) in zip(("few", "validation", "train"), pairwise(cuts), strict=True):
        made[part] = encoded(train[a:b])
    made["test"] = encoded(found["test"][:TEST])
    return made


def columns() -> dict[str, tuple[int, int]]:
    found, start = {}, 0
    for task, n in CLASSES.items():
        found[task] = start, start + n
        start += n
    return found


def text(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """Sentiment, kinds of question, intents of three assistants."""
    folder = data_folder(data)
    of = Family(
        "encoder", Encoder, columns(), BASE, EXPERT,
        {"files": digest(folder, tuple(CLASSES)), "sizes": [FEW, VALIDATION, TRAIN], "words": WORDS},
        (Encoder, Block, tokens),
    )  # fmt: skip
    found = {t: examples(folder, t) for t in CLASSES}
    place = columns()

    def targets(task: str, part: str) -> tuple[Tensor, Tensor]:
        x, y = found[task][part]
        return x, y + place[task][0]

    base = of.pretrained(lambda: {t: targets(t, "few") for t in CLASSES}, seed, say)
    experts = {t: of.tuned(base, t, lambda t=t: targets(t, "train"), seed, say) for t in CLASSES}  # type: ignore[misc]
    joint = of.tuned(base, "joint", lambda: joined([targets(t, "train") for t in CLASSES]), seed, say, JOINT)
    parts = ("train", "validation", "test")
    return Suite(
        "text", lambda: Encoder(of.width),
        [Task(t, {p: found[t][p] for p in parts}, place[t]) for t in CLASSES], experts, base,
        [Task(t, {"test": examples(folder, t)["test"]}, place[like]) for t, like in UNSEEN.items()], joint,
        about="Five classifications of short texts (sentiment, kinds of question, intents), a transformer encoder "
        "of 0.35 M weights over 2047 hashed words.", seed=seed,
    )  # fmt: skip
