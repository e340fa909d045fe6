"""The data that suites read: folders of WEFT_DATA (index.json says what is there), split once and for all.

Test examples are the data's own; pre-training, training and validation examples come from its training part by a
permutation that is the same for every seed of the training, so that a split never changes sides.
"""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from weft.bench.cache import code, stored
from weft.errors import DataError, UsageError

VARIABLE = "WEFT_DATA"
SPLIT_SEED = 7
SIDE = 16


def data_folder(given: str | Path | None = None) -> Path:
    """The folder of `--data` or WEFT_DATA. UsageError where neither is there."""
    named = given or os.environ.get(VARIABLE)
    if not named:
        raise UsageError(
            f"this suite reads a folder of data sets that weft does not ship: name it with --data or {VARIABLE} "
            "(docs/bench.md says what is in it), or run the suite 'digits', which needs scikit-learn only"
        )
    folder = Path(named)
    if not (folder / "index.json").is_file():
        raise DataError(f"{folder} holds no index.json: it is no folder of data sets (see docs/bench.md)")
    return folder


@cache
def _index(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((folder / "index.json").read_text("utf-8"))["datasets"]
        return {d["name"]: d for d in found}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'index.json'} lists no data sets ({type(error).__name__}: {error})"
        ) from None


def entry(folder: Path, name: str) -> dict[str, Any]:
    """What the index says of a data set. DataError where it is not there."""
    found = _index(folder)
    if name not in found:
        raise DataError(f"{folder} has no data set {name!r}: the suite needs it")
    return found[name]


def digest(folder: Path, names: tuple[str, ...]) -> list[Any]:
    """What tells the data apart, for the key of the cache."""
    return [[n, entry(folder, n).get("sha256")] for n in names]


def permutation(n: int) -> np.ndarray[Any, Any]:
    """numpy's RandomState keeps its stream for ever."""
    return np.random.RandomState(SPLIT_SEED).permutation(n)


@cache
def images(folder: Path, name: str, side: int = SIDE) -> dict[str, tuple[Tensor, Tensor]]:
    """{"train": (x, y), "test": (x, y)}: x float32 [n, 3, side, side] in [-1, 1], y int64; shuffled.

    Some archives take seconds to unpack, so the small images are kept in the user's cache, rounded to 8 bits.
    """
    about = {"data": digest(folder, (name,)), "side": side, "code": code(_image, _unpacked, permutation)}
    kept = stored("images", about, lambda: _unpacked(folder, name, side))
    parts = sorted({n.partition("_")[2] for n in kept})
    return {p: (kept[f"x_{p}"].float() / 127.5 - 1, kept[f"y_{p}"].long()) for p in parts}


def _unpacked(folder: Path, name: str, side: int) -> dict[str, Tensor]:
    path = folder / entry(folder, name)["file"]
    made = {}
    try:
        with np.load(path) as file:
            for part in ("train", "test"):
                if f"x_{part}" in file and len(file[f"x_{part}"]):
                    x, y = file[f"x_{part}"], file[f"y_{part}"]
                    order = permutation(len(x))
                    made[f"x_{part}"] = ((_image(x[order], side) + 1) * 127.5).round().to(torch.uint8)
                    made[f"y_{part}"] = torch.from_numpy(y[order].astype(np.int16))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read as images: {error}") from None
    return made


def _image(x: np.ndarray[Any, Any], side: int) -> Tensor:
    """uint8 [n, h, w(, 3)] → float32 [n, 3, side, side]; grey images get three equal channels."""
    t = torch.from_numpy(np.ascontiguousarray(x)).float() / 127.5 - 1
    t = t[:, None] if t.ndim == 3 else t.permute(0, 3, 1, 2)
    if t.shape[-1] == 28:
        t = F.pad(t, (2, 2, 2, 2), value=-1.0)
    t = F.adaptive_avg_pool2d(t, side) if t.shape[-1] != side else t
    return t.expand(-1, 3, -1, -1).contiguous()


@cache
def lines(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """The records of a .jsonl.gz by their split, shuffled."""
    path = folder / entry(folder, name)["file"]
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as lines of JSON: {error}") from None
    found: dict[str, list[dict[str, Any]]] = {}
    for i in permutation(len(records)):
        found.setdefault(records[i]["split"], []).append(records[i])
    return found


@cache
def corpus(folder: Path, name: str) -> dict[str, str]:
    """{"train": text, "test": text}."""
    files = entry(folder, name)["file"]
    made = {}
    for part, file in zip(("train", "test"), files, strict=True):
        try:
            made[part] = gzip.decompress((folder / file).read_bytes()).decode("utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / file} cannot be read as text: {error}") from None
    return made
