"""tokenizer.model as data: the pieces of a SentencePiece model, without its library.

The file is a protocol buffer. Only what a vocabulary needs is looked at:

    ModelProto    1: repeated SentencePiece     2: TrainerSpec
    SentencePiece 1: piece (text)               3: type (1 normal, 2 unknown, 3 control, 4 user defined, 6 byte)
    TrainerSpec   3: model_type (1 unigram, 2 BPE, 3 word, 4 character)

Everything else is skipped by its length. A length that leaves the file is an error, never an allocation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft.errors import DataError

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
MODEL_TYPES = {1: "Unigram", 2: "BPE", 3: "WordLevel", 4: "Char"}


@dataclass(frozen=True)
class Pieces:
    """Every piece in the order of its number, with its type; and the kind of model."""

    pieces: tuple[tuple[str, int], ...]
    model_type: str


def read_pieces(data: bytes, where: str, most: int = 10_000_000) -> Pieces:
    """The pieces of a SentencePiece model; DataError if `data` is none."""
    pieces: list[tuple[str, int]] = []
    model_type = 1
    for number, value in _fields(data, where):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value, where))
            if len(pieces) > most:
                raise DataError(f"{where} has more than {most:,} pieces; it is no tokenizer")
        elif number == 2 and isinstance(value, bytes):
            model_type = next((v for n, v in _fields(value, where) if n == 3 and isinstance(v, int)), 1)
    if not pieces:
        raise DataError(f"{where} holds no pieces; it is no SentencePiece model")
    return Pieces(tuple(pieces), MODEL_TYPES.get(model_type, "Unigram"))


def _piece(data: bytes, where: str) -> tuple[str, int]:
    text, kind = "", 1
    for number, value in _fields(data, where):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError:
                raise DataError(f"{where}: a piece is not UTF-8 text; fetch the file again") from None
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, kind


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of one message: an int for a varint, else the bytes."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at, where)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, where)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at, where)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise DataError(f"{where} is no protocol buffer (wire type {wire} at byte {at}); fetch it again")
        if at + length > end:
            raise DataError(f"{where} is cut short: a field at byte {at} is {length:,} bytes long")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int, where: str) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise DataError(f"{where} is no protocol buffer (a number at byte {at} has no end)")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
