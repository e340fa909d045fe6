"""The bytes that tokens stand for, so that tokens of different kinds of tokenizers can be compared.

    byte-level      a letter for each byte (GPT-2's table: printable ones stand for themselves)    Ġthe   → " the"
    sentencepiece   ▁ for a space, <0xNN> for a byte                                             ▁the   → " the"
    wordpiece       a word's first piece has an unwritten space before it, others begin with ##   the    → " the"
    words           as they are

Only a transplant compares tokens in this form. A merge takes tokens for equal when their texts are.
"""

from __future__ import annotations

from functools import lru_cache

from weft.llm.tokens.vocabulary import Vocabulary


@lru_cache(maxsize=1)
def letters() -> dict[str, int]:
    """GPT-2's table, letter → byte: visible Latin-1 characters stand for themselves, the rest for 256 and on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def form(token: str, vocabulary: Vocabulary) -> bytes | None:
    """The bytes of a token; None for one that stands for no text (a special token, or undecodable)."""
    if token in vocabulary.special:
        return None
    if token in vocabulary.bytes_fallback:
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    if token in vocabulary.added:
        return token.encode(errors="surrogatepass")
    if vocabulary.kind == "byte-level":
        table = letters()
        try:
            return bytes([table[c] for c in token])
        except KeyError:
            return None
    if vocabulary.kind == "sentencepiece":
        token = token.replace("▁", " ")
    elif vocabulary.kind == "wordpiece":
        token = token[2:] if token.startswith("##") and len(token) > 2 else " " + token
    return token.encode(errors="surrogatepass")


def forms(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Bytes → number of the token that stands for them; a plain token goes before a byte token."""
    found: dict[bytes, int] = {}
    for token, i in vocabulary.ids.items():
        made = form(token, vocabulary)
        if made and (made not in found or token not in vocabulary.bytes_fallback):
            found[made] = i
    return found
