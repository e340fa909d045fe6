"""Machine code of kernels: compiled by numba once a machine, loaded by llvmlite alone ever after.

numba takes longer to import than a model of a billion parameters takes to merge, and only its compiler is needed,
once. A kernel is one function without any call to Python or to numba's runtime, so its object code can be
kept as it is. It is kept in the user's cache folder under the hash of all that it depends on: the source, the
primitives, the compiler and the processor. Without a writable cache it is compiled in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from weft._version import __version__
from weft.checkpoints.digests import cache_folder

Argument = np.ndarray[Any, Any] | np.generic | float | int
_LOCK = threading.RLock()
# without numba's runtime nothing can be allocated or raised, and no code outside is called
_ALONE: dict[str, Any] = {
    "nogil": True, "error_model": "numpy", "boundscheck": False,
    "_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip


class Kernel:
    """A source text that defines `kernel`, callable on arrays and numbers; it changes the arrays in place."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._functions: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *arguments: Argument) -> None:
        # what tells the types apart and is quick to find out
        key = tuple([(a.dtype.char, a.ndim) if isinstance(a, np.ndarray) else type(a) for a in arguments])
        function = self._functions.get(key)
        if function is None:
            with _LOCK:
                function = self._functions.get(key) or _function(self.source, tuple(map(_type, arguments)))
                self._functions[key] = function
        nothing = ctypes.c_void_p()  # where numba's convention has a function leave its result and exception
        function(ctypes.byref(nothing), ctypes.byref(nothing), *_flat(arguments))


@cache
def kernel(source: str) -> Kernel:
    """The kernel of a source text."""
    return Kernel(source)


def _type(argument: Argument) -> str:
    """`"float64"` for a number, `"float32[2]"` for an array of two dimensions."""
    if isinstance(argument, np.ndarray):
        return f"{argument.dtype.name}[{argument.ndim}]"
    if isinstance(argument, np.generic):
        return argument.dtype.name
    return {bool: "bool", int: "int64", float: "float64"}[type(argument)]


def _flat(arguments: Sequence[Argument]) -> list[Any]:
    """The arguments as numba's calling convention passes them: an array in its parts."""
    parts: list[Any] = []
    for a in arguments:
        if isinstance(a, np.ndarray):
            assert a.flags.c_contiguous
            address = a.__array_interface__["data"][0]
            parts += (0, 0, a.size, a.itemsize, address, *a.shape, *a.strides)
        else:
            parts.append(a.item() if isinstance(a, np.generic) else a)
    return parts


def _function(source: str, types: tuple[str, ...]) -> Any:
    """The machine code, from the cache or compiled, as a C function that runs without Python's lock."""
    path = _path(source, types)
    code = _read(path)
    if code is None:
        code = _compile(source, types)
        _write(path, code)
    scalar = {"bool": ctypes.c_bool, "int64": ctypes.c_int64, "uint32": ctypes.c_uint32,
              "float64": ctypes.c_double, "float32": ctypes.c_float}  # fmt: skip
    passed: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
    for t in types:
        if t in scalar:
            passed.append(scalar[t])
        else:
            dimensions = int(t[t.index("[") + 1 : -1])
            at, word = ctypes.c_void_p, ctypes.c_ssize_t
            passed += [at, at, word, word, at, *[word] * 2 * dimensions]
    symbol, _, machine_code = code.partition(b"\n")
    return ctypes.CFUNCTYPE(ctypes.c_int32, *passed)(_load(symbol.decode(), machine_code))


_ENGINES: list[Any] = []
"""What owns the loaded code; kept until the process ends."""


def _load(symbol: str, machine_code: bytes) -> int:
    """The address of `symbol`, which the object code defines."""
    llvm = _llvm()
    target = llvm.Target.from_default_triple().create_target_machine()
    # an engine of its own, since numba's names are unique only within one process
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    _ENGINES.append(engine)
    address: int = engine.get_function_address(symbol)
    return address


@cache
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def _compile(source: str, types: tuple[str, ...]) -> bytes:
    """The symbol, a line end, and the object code."""
    import numba

    scope: dict[str, Any] = {}
    exec(compile(source, "<weft kernel>", "exec"), scope)
    signature = []
    for t in types:
        name, _, dimensions = t.partition("[")
        element = numba.boolean if name == "bool" else getattr(numba.types, name)
        signature.append(numba.types.Array(element, int(dimensions[:-1]), "C") if dimensions else element)
    alone: Any = numba.njit(**_ALONE)(scope["kernel"])
    alone.compile(tuple(signature))
    made = alone.overloads[tuple(signature)]
    symbol: str = made.fndesc.llvm_func_name
    machine_code: bytes = made.library._get_compiled_object()
    return symbol.encode() + b"\n" + machine_code


def _path(source: str, types: tuple[str, ...]) -> Path:
    text = "\0".join([_machine(), *types, source])
    return cache_folder() / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.o"


@cache
def _machine() -> str:
    """What machine code depends on beside its source."""
    import llvmlite

    llvm = _llvm()
    pieces = b"".join(Path(__file__).with_name(f"{n}.py").read_bytes() for n in ("primitives", "rows"))
    features = sorted(k for k, there in llvm.get_host_cpu_features().items() if there)
    return "\0".join(
        [__version__, hashlib.sha256(pieces).hexdigest(), llvmlite.__version__,
         llvm.get_process_triple(), llvm.get_host_cpu_name(), ",".join(features)]
    )  # fmt: skip


def _read(path: Path) -> bytes | None:
    """What `_write` wrote there, unless it is damaged."""
    try:
        digest, _, code = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return code if digest == hashlib.sha256(code).hexdigest().encode() else None


def _write(path: Path, code: bytes) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_bytes(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
        temporary.replace(path)
