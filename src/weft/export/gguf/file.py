"""The GGUF file: head (metadata, tensor table) and where each tensor's bytes lie behind it."""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from weft.checkpoints.base import Asset, Checkpoint
from weft.engine.writer import Layout, Place
from weft.errors import MissingExtra, UsageError
from weft.export.gguf.architectures import Architecture, architecture_of, window_note
from weft.export.gguf.metadata import Sizes, add_metadata, rope_tensors
from weft.export.gguf.tensors import named
from weft.export.gguf.tokens import Vocabulary, add_vocabulary, vocabulary_of
from weft.export.gguf.types import PLAIN, Encoded, Stored, choose_type, stored_as

ALIGNMENT = 32
"""Every tensor begins at a multiple of this."""


class Gguf(Encoded):
    """A checkpoint as the tensors of a GGUF file; `layout` says how they lie in it."""

    def __init__(
        self, source: Checkpoint, stored: dict[str, Stored], type: str, known: Architecture, sizes: Sizes,
        vocabulary: Vocabulary | None, notes: list[str], name: str | None,
    ) -> None:  # fmt: skip
        super().__init__(source, stored)
        self.type, self.notes = type, tuple(notes)
        """What was left out or stored otherwise, and why."""
        self._known, self._sizes, self._vocabulary, self._name = known, sizes, vocabulary, name

    @property
    def assets(self) -> tuple[Asset, ...]:
        return ()  # the tokenizer is in the head

    def layout(self, file: str) -> Layout:
        """Where everything lies in a file of this name."""
        offset, places = len(self.head), {}
        for name, info in self.tensors.items():
            places[name] = Place(file, offset)
            offset += -(-info.nbytes // ALIGNMENT) * ALIGNMENT
        return Layout({file: self.head}, {file: offset}, places)

    @cached_property
    def head(self) -> bytes:
        """All that precedes the first tensor's bytes."""
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(None, self._known.arch)
        self._add_metadata(writer)
        for name, stored in self.stored.items():
            # plain types are named too, since the package knows no numpy type for bfloat16
            shape, kind = stored.shape, gguf.GGMLQuantizationType[stored.type.upper()]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), self.info(name).nbytes, raw_dtype=kind)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head"
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            data = path.read_bytes()
        return data + bytes(-len(data) % ALIGNMENT)

    def _add_metadata(self, writer: Any) -> None:
        import gguf

        writer.add_type(gguf.GGUFType.MODEL)
        if self._name:
            writer.add_name(self._name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        kind = "ALL_F32" if self.type == "f32" else f"MOSTLY_{self.type.upper()}"
        writer.add_file_type(gguf.LlamaFileType[kind])
        rows = self.stored["token_embd.weight"].shape[0]
        writer.add_vocab_size(rows)
        add_metadata(writer, self._known, self._sizes)
        if self._vocabulary is None:
            writer.add_tokenizer_model("none")
        else:
            add_vocabulary(writer, self._vocabulary, rows)


def as_gguf(
    checkpoint: Checkpoint,
    type: str | torch.dtype | None = "auto",
    *,
    pre: str | None = None,
    tokenizer: bool = True,
    name: str | None = None,
) -> Gguf:
    """A checkpoint as a GGUF file, lazily: `weft.save(as_gguf(model, "q8_0"), "model.gguf")`.

    `type` is one of `types.TYPES` (auto: as the checkpoint stores its values). `pre` names the pre-tokenizer
    in llama.cpp's words where tokenizer.json has one that weft does not know; `tokenizer=False` leaves the
    vocabulary out; `name` is `general.name`.

    Raises DataError for an architecture, tensors or a tokenizer that GGUF has no place for, all before
    anything is written; MissingExtra without the gguf package.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtra("gguf", "gguf", "writing GGUF") from None
    if isinstance(checkpoint, Gguf):
        if type not in (None, "auto", checkpoint.type):
            raise UsageError(f"{checkpoint.origin} is GGUF of type {checkpoint.type} already; state it once")
        return checkpoint
    if isinstance(type, torch.dtype):
        type = next((n for n, dtype in PLAIN.items() if dtype == type), str(type))
    chosen = choose_type(checkpoint, type or "auto")
    known, config = architecture_of(checkpoint)
    sizes, notes = Sizes(config, checkpoint.origin), window_note(known, config)
    source = named(checkpoint, known, sizes, rope_tensors(known, sizes), notes)
    rows = source.info("token_embd.weight").shape[0]
    vocabulary = vocabulary_of(checkpoint, rows, pre) if tokenizer else None
    if vocabulary is None:
        notes.append("no tokenizer is in the file")
    stored = stored_as(source, chosen, notes)
    return Gguf(source, stored, chosen, known, sizes, vocabulary, notes, name)
