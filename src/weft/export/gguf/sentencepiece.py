"""SentencePiece models (tokenizer.model), read without their library: three fields of a protocol buffer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from weft.errors import DataError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_BPE = 2


@dataclass(frozen=True, slots=True)
class Pieces:
    """The vocabulary: texts, log-probabilities or ranks, and kinds."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    add_dummy_prefix: bool


def read_pieces(data: bytes, where: str) -> Pieces:
    """Parse a model. Raises DataError unless it is a whole SentencePiece BPE model."""
    texts, scores, kinds = list[str](), list[float](), list[int]()
    model_type, prefix = 1, True
    try:
        for field, value in _fields(data):
            if field == _PIECES and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score, kind = piece.get(1, b""), piece.get(2, b"\0\0\0\0"), piece.get(3, 1)
                assert isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)
                texts.append(text.decode("utf-8", "surrogateescape"))
                scores.append(struct.unpack("<f", score)[0])
                kinds.append(kind)
            elif field == _TRAINER and isinstance(value, bytes):
                found = dict(_fields(value)).get(3, 1)
                model_type = found if isinstance(found, int) else 1
            elif field == _NORMALIZER and isinstance(value, bytes):
                prefix = bool(dict(_fields(value)).get(3, 1))
    except (IndexError, AssertionError, struct.error):
        raise DataError(f"{where} is no SentencePiece model, or is cut short; fetch it again") from None
    if not texts or any(not 1 <= k <= 6 for k in kinds):
        raise DataError(f"{where} is no SentencePiece model; fetch it again")
    if model_type != _BPE:
        raise DataError(
            f"{where} is a SentencePiece model that is no BPE, for which weft knows no place in GGUF"
        )
    return Pieces(tuple(texts), tuple(scores), tuple(kinds), prefix)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[wire] if wire in (1, 5) else -1
        if size < 0 or at + size > len(data):
            raise IndexError
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and where the next field begins; IndexError where the data end."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise IndexError
