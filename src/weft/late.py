"""torch, imported when something of it is first used.

Merging files whose kernels are compiled takes no torch, and importing it takes longer than many a merge. The
modules on that way write `from weft.late import Tensor, torch`: for the type checker both are torch's own, at run
time `torch` stands for the module and `Tensor` for its class, in annotations and in `isinstance`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:

    class _Torch:
        """Stands for the module."""

        def __getattr__(self, name: str) -> Any:
            return getattr(loaded(), name)

    class _IsTensor(type):
        def __instancecheck__(cls, x: object) -> bool:
            # nobody has a tensor who has no torch, or not the whole of it yet
            there = getattr(sys.modules.get("torch"), "Tensor", None)
            return there is not None and isinstance(x, there)

    class Tensor(metaclass=_IsTensor):
        """Stands for the class."""

    torch = _Torch()

_module: Any = None
_alone = 0
"""How many blocks of `one_thread` are open."""
_threads: int | None = None
"""How many threads torch had before the first of them, or when it came."""
_LOCK = threading.Lock()


def loaded() -> Any:
    """The module itself, imported now if it is not there yet."""
    global _module
    if _module is None:
        import torch as module  # waits where another thread is about to

        with _LOCK:
            _module = module
            _confine()
    return _module


def _confine() -> None:
    global _threads
    if _alone and _threads is None:
        _threads = _module.get_num_threads()
        _module.set_num_threads(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread, whether it is there already or comes during the block."""
    global _alone, _threads
    if "torch" in sys.modules:
        loaded()
    with _LOCK:
        _alone += 1
        if _module is not None:
            _confine()
    try:
        yield
    finally:
        with _LOCK:
            _alone -= 1
            if not _alone and _threads is not None:
                _module.set_num_threads(_threads)
                _threads = None
