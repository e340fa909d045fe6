"""The one-line notation for a model: `path[@revision][+adapter[@revision]]`.

`@@` and `++` stand for the characters themselves, and a string that exists as a local path is that path
whatever it contains, so no folder is beyond naming.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path

from weft.errors import UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least, so that C:// stays a drive

_URL_HOST = re.compile(_URL.pattern + r"[^/]*")


class Kind(enum.Enum):
    """What a reference's path can be, by its looks alone."""

    LOCAL = "local"
    HUB = "hub"
    URL = "url"


@dataclass(frozen=True, slots=True)
class Ref:
    """A model, at a revision, with an adapter laid over it."""

    path: str
    revision: str | None = None
    lora: Ref | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and (not self.revision or self.revision.startswith("@")):
            raise UsageError(f"{self.revision!r} is no revision")
        if self.lora is not None and self.lora.path.startswith("+"):
            # "a+++b" could be read both ways; "./" says which
            lora = Ref("./" + self.lora.path, self.lora.revision, self.lora.lora)
            object.__setattr__(self, "lora", lora)
        if self.lora is not None and self.revision is None:
            together = _URL.match(f"{self.path}+{self.lora.path}")
            if together and not _URL.match(self.path):  # "git" with "ssh://host" is not git+ssh://host
                object.__setattr__(self, "path", "./" + self.path)

    @property
    def kind(self) -> Kind:
        """URL, Hub id (`org/name`, unless a local path has that name) or local path."""
        if _URL.match(self.path):
            return Kind.URL
        if _HUB_ID.fullmatch(self.path) and ".." not in self.path and "--" not in self.path:
            return Kind.HUB
        return Kind.LOCAL

    def __str__(self) -> str:
        text = _escape(self.path, _literal(self.path))
        if self.revision is not None:
            text += "@" + _escape(self.revision, 0)
        if self.lora is not None:
            text += f"+{self.lora}"
        return text


def parse_ref(text: str) -> Ref:
    """The reference that `text` writes down. UsageError where it cannot be one."""
    if not text or "\0" in text:
        raise UsageError("a model reference may not be empty or hold a NUL character")
    if _exists(text):
        return Ref(text)
    parts = [_split(part, "@") for part in _split(text, "+")]
    if len(parts) > 2:
        raise UsageError(
            f"{text!r} names more than one adapter; write ++ for a plain + in a path, "
            "or nest a second merge for a second adapter"
        )
    refs: list[Ref] = []
    for part in parts:
        if len(part) > 2 or not all(part):
            raise UsageError(
                f"{text!r} is no model reference: write path[@revision][+adapter[@revision]], "
                "with @@ and ++ for the characters themselves"
            )
        refs.append(Ref(part[0], part[1] if len(part) == 2 else None))
    model = refs[0]
    return Ref(model.path, model.revision, refs[1] if len(refs) == 2 else None)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # longer than a path may be
        return False


def _split(text: str, mark: str) -> list[str]:
    """Parts of `text` between single `mark`s; a doubled one is the character itself."""
    i = _literal(text)
    parts = [text[:i]]
    while i < len(text):
        if text.startswith(mark * 2, i):
            parts[-1] += mark
            i += 2
        elif text[i] == mark:
            # an adapter may be a URL, too; a revision is none
            plain = _literal(text[i + 1 :]) if mark == "+" else 0
            parts.append(text[i + 1 : i + 1 + plain])
            i += 1 + plain
        else:
            parts[-1] += text[i]
            i += 1
    return parts


def _escape(text: str, plain: int) -> str:
    return text[:plain] + text[plain:].replace("@", "@@").replace("+", "++")


def _literal(text: str) -> int:
    """Length of the scheme and host of a URL, where `user@host` and `git+ssh` are no marks of ours."""
    url = _URL_HOST.match(text)
    return url.end() if url else 0
