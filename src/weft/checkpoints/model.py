"""What lies beside the weights: config.json, tokenizer and generation files, and the ties the config states.

All of it is data. Nothing of a model folder is ever imported or executed, and of its other files only those
known to belong to a released model travel with it; code, notes and other weights stay behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DType
from weft.checkpoints.folders import Folder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, check_file_name
from weft.checkpoints.strictjson import parse_json
from weft.late import Tensor, torch

CONFIG = "config.json"

_CARRIED = re.compile(
    r"""tokenizer.*\.(json|model|txt) | vocab.* | merges.* | .*\.(model|jinja|tiktoken|spm)
      | special_tokens_map\.json | added_tokens\.json | chat_template\..* | generation_config\.json
      | (pre|video_pre)?processor_config\.json | (image|feature_extractor|video)_?\w*config\.json
      | modules\.json | sentence_bert_config\.json | config_sentence_transformers\.json""",
    re.VERBOSE,
)
_NOT_CARRIED = re.compile(r".*\.(py|pyc|so|safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack|npz)")
_CARRIED_SUBFOLDER = re.compile(r"\d+_\w+|additional_chat_templates")
# sentence-transformers keeps a dense layer's few weights in a folder of its own
_CARRIED_BELOW = re.compile(r"config\.json|.*\.jinja|model\.safetensors")


class Model(Checkpoint):
    """Weights with the config and the files that travel with them."""

    def __init__(
        self,
        weights: Checkpoint,
        config: Mapping[str, Any] | None,
        assets: tuple[Asset, ...],
        origin: str,
    ) -> None:
        self.origin = origin
        self.weights = weights
        self._config = config
        self._assets = assets
        self._aliases = {**_tied_by_config(weights, config), **weights.aliases}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.weights.tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self._assets

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self.weights.inputs

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self.weights.files

    @property
    def skipped(self) -> list[str]:
        """Entries of the weight files that are no weights, by name."""
        return list(getattr(self.weights, "skipped", ()))

    def at_hand(self, name: str) -> bool:
        return self.weights.at_hand(name)

    def grain(self, name: str) -> int:
        return self.weights.grain(name)

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return self.weights.read(name, start, stop, dtype=dtype)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        return self.weights.bits(name, start, stop, dtype=dtype)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        self.weights.prefetch(name, start, stop)


def read_config(folder: Folder, name: str = CONFIG, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """A JSON file of the folder, as data."""
    data = folder.read(name, limits.config_bytes, "config-size")
    return parse_json(data, f"{folder.name}/{name}", "config-json", depth=limits.config_depth)


def assets_of(folder: Folder, limits: Limits = DEFAULT_LIMITS) -> tuple[Asset, ...]:
    """The files that travel with the weights, each checked now and read when it is written."""
    names = [n for n in folder.files() if _CARRIED.fullmatch(n) and not _NOT_CARRIED.fullmatch(n)]
    for sub in folder.subfolders():
        if _CARRIED_SUBFOLDER.fullmatch(sub):
            names += [n for n in folder.files(sub) if _CARRIED_BELOW.fullmatch(n.removeprefix(f"{sub}/"))]
    for name in names:
        check_file_name(name, folder.name)
        folder.check(name)
    return tuple(Asset(name, partial(folder.read, name, limits.asset_bytes, "asset-size")) for name in names)


def _tied_by_config(weights: Checkpoint, config: Mapping[str, Any] | None) -> dict[str, str]:
    """`lm_head.weight` → the embedding, where the config says they are tied and only that is there."""
    if not config or not isinstance(config.get("text_config", {}), dict):
        return {}
    text = config.get("text_config", {})
    if not config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        return {}
    names = weights.tensors
    if any(n.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for n in names):
        return {}
    embeddings = [n for n in names if n.endswith(("embed_tokens.weight", "wte.weight"))]
    if len(embeddings) != 1 or "lm_head.weight" in weights.aliases:
        return {}
    return {"lm_head.weight": embeddings[0]}
