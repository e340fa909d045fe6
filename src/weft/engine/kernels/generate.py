"""From a body of scalar lines to a compiled kernel.

The source is written to a file of the user's cache folder under the hash of its contents, where numba also
keeps the machine code, so that a kernel is compiled once a machine. Without a writable cache it is compiled
in memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weft._version import __version__
from weft.checkpoints.digests import cache_folder
from weft.engine.kernels import primitives
from weft.engine.kernels.emit import Body

_LOCK = threading.Lock()
_LOADED: dict[str, Callable[..., Any]] = {}
_PRIMITIVES = hashlib.sha256(Path(primitives.__file__).read_bytes()).hexdigest()[:12]

_HEAD = """\
import numpy as np
from numba import njit
from weft.engine.kernels.primitives import (
    BLOCK, bits, count_lower, count_upper, dot, from_bf16, magnitude, short_bf16, store_bf16,
    store_float, total, u32,
)


@njit(nogil=True, error_model="numpy", boundscheck=False, cache={cache})
def kernel({arguments}, p, q, low):
{hoisted}    n = {first}.shape[0]
"""


class Source:
    """One kernel: inputs (raw or float), what is done to a value, and the loop over blocks around it."""

    def __init__(self, raw: Sequence[bool], base: bool | None) -> None:
        """`raw[i]`: whether input i is raw bf16; `base`: the same of the base, None without one."""
        self.raw, self.base = list(raw), base
        self.arguments = [f"x{i}" for i in range(len(raw))]
        self.sliced: list[str] = []
        """Further arguments of which a block sees its slice."""
        self.loads: list[str] = []
        if base is not None:
            self.add_base(base)
        minus = " - base" if base is not None else ""
        self.loads += [f"d{i} = {_load(f'x{i}', is_raw)}{minus}" for i, is_raw in enumerate(raw)]
        self.body = Body([f"d{i}" for i in range(len(raw))])

    def add_base(self, raw: bool) -> None:
        """Load the base's value as `base`."""
        self.arguments.append("b")
        self.loads.append(f"base = {_load('b', raw)}")

    def short_loads(self) -> list[str]:
        """The inputs less the base in float32: where they have no more bits, the rounding is the same."""
        minus = "" if self.base is None else f" - {_load('b', self.base, short=True)}"
        return [
            f"f{i} = np.float32({_load(f'x{i}', raw, short=True)}{minus})" for i, raw in enumerate(self.raw)
        ]

    def finish(
        self,
        extra: Sequence[str],
        before: str,
        per_value: Sequence[str],
        after: str,
        loads: Sequence[str] | None = None,
    ) -> str:
        """The source text: `before` the loop, `per_value` lines after the body, `after` each block.

        `loads` replaces the loading lines and the body. Each block works on slices, whose indices the
        compiler can see not to be negative: otherwise it checks each and vectorises nothing.
        """
        body = self.body
        hoisted = [f"p{i} = p[{i}]" for i in range(len(body.floats))]
        hoisted += [f"q{i} = q[{i}]" for i in range(len(body.words))]
        text = _HEAD.format(
            cache="{cache}",
            arguments=", ".join([*self.arguments, *extra]),
            hoisted="".join(f"    {line}\n" for line in hoisted),
            first=self.arguments[0],
        )
        text += _indent(before, 4)
        text += "    for s in range(0, n, BLOCK):\n        m = min(BLOCK, n - s)\n"
        text += _indent("\n".join(f"{a}_ = {a}[s : s + m]" for a in [*self.arguments, *self.sliced]), 8)
        text += "        here = u32(low + u32(s))\n        for j in range(m):\n"
        lines = [*self.loads, *body.lines, *per_value] if loads is None else [*loads, *per_value]
        return text + _indent("\n".join(lines), 12) + _indent(after, 8)


def _load(array: str, raw: bool, short: bool = False) -> str:
    if raw:
        return f"{'short' if short else 'from'}_bf16({array}_[j])"
    return f"np.float{32 if short else 64}({array}_[j])"


def _indent(text: str, by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in text.splitlines())


def compiled(source: str) -> Callable[..., Any]:
    """The kernel of a source text; compiled for its arguments' types at the first call."""
    with _LOCK:
        if source not in _LOADED:
            _LOADED[source] = _load_cached(source) or _load_in_memory(source)
        return _LOADED[source]


def _load_cached(source: str) -> Callable[..., Any] | None:
    # the primitives are part of the machine code, but numba only watches the file it compiles
    text = f"# weft {__version__} {_PRIMITIVES}\n" + source.format(cache=True)
    name = f"weft_kernel_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    path = cache_folder() / "kernels" / f"{name}.py"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        if path.read_text(encoding="utf-8") != text:
            return None
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # numba looks the function up there when it loads machine code
        spec.loader.exec_module(module)
    except OSError:
        return None
    found: Callable[..., Any] = module.kernel
    return found


def _load_in_memory(source: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(compile(source.format(cache=False), "<weft kernel>", "exec"), scope)
    found: Callable[..., Any] = scope["kernel"]
    return found
