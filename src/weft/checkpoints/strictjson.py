"""JSON from strangers: no duplicate keys, bounded depth, only UnsafeFile on failure.

Which of two equal keys wins depends on the parser; a file that two readers see differently is refused.
"""

from __future__ import annotations

import json
from typing import Any

from weft.checkpoints.limits import shown
from weft.errors import UnsafeFile


class _Refused(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {shown(twice)} appears twice")
    return made


def _natural(text: str) -> int:
    if text[0] == "-" or len(text) > 20:
        raise _Refused(f"{shown(text)} is not a length")
    return int(text)


def _constant(text: str) -> Any:
    raise _Refused(f"{text} is not JSON")


def parse_json(
    data: bytes, where: str, code: str, *, depth: int | None = 64, naturals: bool = False
) -> dict[str, Any]:
    """The object in `data`. With `naturals` `-0` and NaN are refused too. With `depth=None`
    the caller checks each level.

    Raises UnsafeFile(`code`), or UnsafeFile("duplicate-key").
    """
    # a call for each of a million numbers costs a second; only "-0" is lost once it is parsed
    watched = naturals and b"-0" in data
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_natural if watched else None,
            parse_constant=_constant if naturals else None,  # configs do say Infinity
        )
    except _Refused as error:
        code = "duplicate-key" if "twice" in str(error) else code
        raise UnsafeFile(code, f"{where}: {error}; write the file again") from None
    except UnicodeDecodeError:
        raise UnsafeFile(code, f"{where} is not UTF-8 text; write the file again") from None
    except RecursionError:
        raise UnsafeFile(code, f"{where} is nested too deeply; write the file again") from None
    except ValueError as error:
        raise UnsafeFile(code, f"{where} is not JSON ({error}); write the file again") from None
    if not isinstance(parsed, dict):
        raise UnsafeFile(code, f"{where} must hold a JSON object; write the file again")
    if depth is not None:
        _check_depth(parsed, where, code, depth)
    return parsed


def _check_depth(parsed: dict[str, Any], where: str, code: str, limit: int) -> None:
    level: list[Any] = [parsed]
    for _ in range(limit + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise UnsafeFile(code, f"{where} is nested deeper than {limit} levels; write the file again")
