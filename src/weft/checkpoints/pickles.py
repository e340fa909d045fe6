"""Read a torch pickle as data: an interpreter for the few opcodes that a state dict needs.

Nothing is imported and nothing is called. A global is only ever a name from the table below, and what a
pickle would have built is described instead: `StoredTensor` says which bytes of which storage a tensor
shows. Whatever is outside the table is refused, with a list of what was seen, so there is no deny list
to outwit and no fallback to force.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown
from weft.errors import UnsafeFile
from weft.late import torch

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {
    str(d): d
    for d in (*_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
              torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
}  # fmt: skip
_FUNCTIONS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._tensor._rebuild_from_type_v2",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """One storage of the file: its key, and how many bytes the pickle says it has."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the pickle describes it, not yet checked against its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


class _Unknown:
    """What a refused global would have made; the reading goes on, to name every such global at once."""


class _Malformed(Exception):
    pass


_MARK = object()
_UNKNOWN = _Unknown()


def read_pickle(
    data: bytes, where: str, limits: Limits = DEFAULT_LIMITS, *, alone: bool = True
) -> tuple[Any, int]:
    """What the first pickle in `data` describes, and where it ends.

    With `alone`, bytes after it are refused. Raises UnsafeFile("pickle-…").
    """
    machine = _Machine(where, limits)
    try:
        value, end = machine.run(data)
    except (_Malformed, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as e:
        machine.refuse_globals()
        raise UnsafeFile(
            "pickle-opcode", f"{where} is no valid torch pickle ({e}); convert it to safetensors"
        ) from None
    machine.refuse_globals()
    if alone and end != len(data):
        raise UnsafeFile(
            "pickle-opcode",
            f"{where} has {len(data) - end} bytes after its pickle; convert it to safetensors",
        )
    return value, end


class _Machine:
    """Stack, marks and memo: all a pickle has."""

    def __init__(self, where: str, limits: Limits) -> None:
        self._where, self._limits = where, limits
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._refused: dict[str, None] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
            if count >= self._limits.pickle_opcodes:
                raise UnsafeFile(
                    "pickle-size",
                    f"{self._where} has over {self._limits.pickle_opcodes:,} pickle opcodes; "
                    "convert it to safetensors",
                )
            name = opcode.name
            if name == "STOP":
                if len(self._stack) != 1:
                    raise _Malformed("it leaves values behind")
                return self._stack[0], (position or 0) + 1
            if name in _LITERALS:
                self._stack.append(arg)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, arg)
            elif name not in ("PROTO", "FRAME"):
                raise UnsafeFile(
                    "pickle-opcode",
                    f"{self._where} uses the pickle opcode {name}, which no state dict needs; do not load "
                    "it elsewhere either unless you trust its author",
                )
        raise _Malformed("it does not end")

    def refuse_globals(self) -> None:
        if self._refused:
            seen = ", ".join(shown(name) for name in list(self._refused)[:20])
            raise UnsafeFile(
                "pickle-global",
                f"{self._where} needs {seen} to be loaded, which are not weights and could run code; if "
                "you trust its author, load it yourself and save its state dict as safetensors",
            )

    # -- opcodes ------------------------------------------------------------------------------------

    def marked(self) -> list[Any]:
        """The values above the last mark, which is removed."""
        at = len(self._stack) - 1
        while at >= 0 and self._stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise _Malformed("a mark is missing")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def pop(self, count: int) -> list[Any]:
        if len(self._stack) < count or any(v is _MARK for v in self._stack[-count:]):
            raise _Malformed("its stack is too short")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def put(self, key: int | None) -> None:
        self._memo[len(self._memo) if key is None else key] = self._stack[-1]

    def get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def set_items(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if into is _UNKNOWN:
            return
        if not isinstance(into, dict) or len(items) % 2:
            raise _Malformed("it sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # a key that is a nest of tuples costs exponential time to hash
            if not isinstance(key, str | int | float | bytes | None):
                raise _Malformed("a key is neither text nor number")
            into[key] = value

    def append(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if into is _UNKNOWN:
            return
        if not isinstance(into, list):
            raise _Malformed("it appends to what is no list")
        into.extend(items)

    def find(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Malformed("a global has no literal name")
        full = f"{module}.{name}"
        known = (
            full in _FUNCTIONS
            or full in _DTYPES
            or (module in ("torch", "torch.storage") and name in _STORAGES)
        )
        if not known:
            self._refused[full] = None
        self._stack.append(_Global(full) if known else _UNKNOWN)

    def reduce(self) -> None:
        function, args = self.pop(2)
        self._stack.append(_call(function, args))

    def build(self) -> None:
        """Attributes set on a dict or a parameter (`_metadata`, hooks) say nothing of the weights."""
        self.pop(1)
        if not isinstance(self._stack[-1], dict | StoredTensor | _Unknown):
            raise _Malformed("it sets the state of what has none")

    def storage(self) -> None:
        (found,) = self.pop(1)
        if not (isinstance(found, tuple) and len(found) >= 5 and found[0] == "storage"):
            raise _Malformed("a persistent id is no storage")
        kind, key, numel = found[1], found[2], found[4]
        dtype = _STORAGES.get(kind.name.rpartition(".")[2]) if isinstance(kind, _Global) else None
        if kind is _UNKNOWN:
            self._stack.append(_UNKNOWN)
            return
        if (
            dtype is None
            or not isinstance(key, str)
            or not _is_length(numel)
            or found[5:] not in ((), (None,))
        ):
            raise _Malformed("a storage is not described as torch does")
        self._stack.append(Storage(key, dtype, numel * dtype.itemsize))


def _is_length(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _call(function: Any, args: Any) -> Any:
    """What the call would build, described. Only the names in `_FUNCTIONS` mean anything."""
    if function is _UNKNOWN:
        return _UNKNOWN
    if not isinstance(function, _Global) or not isinstance(args, tuple):
        raise _Malformed("it calls what is no function")
    name = function.name.rpartition(".")[2]
    if name == "OrderedDict" and args in ((), ([],)):
        return {}
    if name == "Size" and len(args) == 1 and isinstance(args[0], tuple | list):
        return tuple(args[0])
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and args:
        return _as_tensor(args[0])
    if name == "_rebuild_from_type_v2" and len(args) == 4:
        return _as_tensor(_call(args[0], args[2]))
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3") and len(args) >= 4:
        return _tensor(name, args)
    raise _Malformed(f"it calls {shown(function.name)} as torch never does")


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, StoredTensor | _Unknown):
        raise _Malformed("a parameter is no tensor")
    return value


def _tensor(name: str, args: tuple[Any, ...]) -> StoredTensor | _Unknown:
    storage, offset, shape, stride = args[:4]
    if isinstance(storage, _Unknown):
        return storage
    if not isinstance(storage, Storage) or not _is_length(offset):
        raise _Malformed("a tensor has no storage")
    for sizes in (shape, stride):
        if not isinstance(sizes, tuple) or not all(map(_is_length, sizes)):
            raise _Malformed("a tensor's shape or stride is not made of lengths")
    if len(shape) != len(stride):
        raise _Malformed("a tensor's shape and stride differ in length")
    dtype = storage.dtype
    if name == "_rebuild_tensor_v3":
        named = args[6] if len(args) > 6 else None
        dtype = _DTYPES[named.name] if isinstance(named, _Global) else dtype
    return StoredTensor(storage, dtype, offset, shape, stride)


_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINSTRING", "SHORT_BINSTRING", "INT", "LONG",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE": lambda m, _: m.push(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.push(tuple(m.pop(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.pop(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.pop(3))),
    "LIST": lambda m, _: m.push(m.marked()),
    "APPEND": lambda m, _: m.append(m.pop(1)),
    "APPENDS": lambda m, _: m.append(m.marked()),
    "ADDITEMS": lambda m, _: m.append(m.marked()),
    "SETITEM": lambda m, _: m.set_items(m.pop(2)),
    "SETITEMS": lambda m, _: m.set_items(m.marked()),
    "BINPUT": lambda m, key: m.put(key),
    "LONG_BINPUT": lambda m, key: m.put(key),
    "MEMOIZE": lambda m, _: m.put(None),
    "BINGET": lambda m, key: m.get(key),
    "LONG_BINGET": lambda m, key: m.get(key),
    "GLOBAL": lambda m, arg: m.find(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.find(*m.pop(2)),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.storage(),
}
