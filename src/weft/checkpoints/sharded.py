"""One checkpoint in several files, with the index that says which tensor is where.

The index is checked against the files in both directions before a value is read: what it names must be
there, once, and nothing else may be. Every problem of a kind is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from weft.checkpoints.base import Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DType
from weft.checkpoints.folders import Folder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, check_file_name, shown
from weft.checkpoints.strictjson import parse_json
from weft.errors import DataProblems, UnsafeFile
from weft.late import Tensor, torch

_LISTED = 20


class Sharded(Checkpoint):
    """Several checkpoints that share no name, as one: order of the parts, then order within each."""

    def __init__(self, parts: Sequence[Checkpoint], origin: str) -> None:
        self.origin = origin
        self._parts = tuple(parts)
        self._home: dict[str, Checkpoint] = {}
        twice = []
        for part in self._parts:
            twice += [f"{shown(n)} ({self._home[n].origin}, {part.origin})" for n in part if n in self._home]
            self._home |= dict.fromkeys(part, part)
        if twice:
            raise UnsafeFile("index", f"{origin}: tensors in two files: {_some(twice)}; remove one")
        self._tensors = {name: part.tensors[name] for name, part in self._home.items()}
        self._aliases = {alias: n for part in self._parts for alias, n in part.aliases.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        self.info(name)
        return self._home[name].read(name, start, stop, dtype=dtype)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        self.info(name)
        return self._home[name].bits(name, start, stop, dtype=dtype)

    def at_hand(self, name: str) -> bool:
        return self._home[name].at_hand(name)

    def grain(self, name: str) -> int:
        self.info(name)
        return self._home[name].grain(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        self._home[name].prefetch(name, start, stop)

    @property
    def skipped(self) -> list[str]:
        """Entries of the parts that are no weights, by name."""
        return [name for part in self._parts for name in getattr(part, "skipped", ())]

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return tuple(file for part in self._parts for file in part.files)


def load_sharded(
    folder: Folder,
    index_name: str,
    open_part: Callable[[str], Checkpoint],
    limits: Limits = DEFAULT_LIMITS,
) -> Sharded:
    """The checkpoint that `index_name` in `folder` describes. `open_part` opens one shard by its name."""
    where = f"{folder.name}/{index_name}"
    index = parse_json(folder.read(index_name, limits.index_bytes, "index-size"), where, "index-json")
    weight_map = _weight_map(index, index_name, where, limits)
    shards = sorted(set(weight_map.values()))
    # from afar each shard costs several round trips, so they are asked for side by side
    with ThreadPoolExecutor(max_workers=8, thread_name_prefix="weft-open") as pool:
        there = list(pool.map(folder.exists, shards))
        missing = [f"{name} is missing" for name, found in zip(shards, there, strict=True) if not found]
        if missing:
            raise DataProblems(f"{where} names files that are not there; fetch them", missing)
        parts = list(pool.map(open_part, shards))
    _check_against(weight_map, dict(zip(shards, parts, strict=True)), where)
    whole = Sharded(parts, folder.name)
    _check_total(index, whole, where, limits)
    return whole


def _weight_map(index: dict[str, Any], index_name: str, where: str, limits: Limits) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise UnsafeFile("index", f"{where} has no weight_map of names to files; write it again")
    shards = set(found.values())
    if len(found) > limits.index_entries or len(shards) > limits.shards:
        raise UnsafeFile(
            "index",
            f"{where} lists {len(found):,} tensors in {len(shards):,} files, over the limits of "
            f"{limits.index_entries:,} and {limits.shards:,}",
        )
    suffix = "." + index_name.removesuffix(".index.json").rsplit(".", 1)[-1]
    for name in sorted(shards):
        check_file_name(name, where, (suffix,))
    folded: dict[str, str] = {}
    for name in sorted(shards):
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise UnsafeFile(
                "path",
                f"{where} names both {shown(other)} and {shown(name)}, one file on some systems; rename one",
            )
    return found


def _check_against(weight_map: dict[str, str], parts: dict[str, Checkpoint], where: str) -> None:
    absent = [
        f"{shown(name)} is not in {shard}"
        for name, shard in weight_map.items()
        if name not in parts[shard] and name not in parts[shard].aliases
    ]
    if absent:
        raise UnsafeFile("index", f"{where} is wrong: {_some(absent)}; fetch the checkpoint again")
    extra = [
        f"{shown(name)} in {shard}"
        for shard, part in parts.items()
        for name in (*part, *part.aliases)
        if weight_map.get(name) != shard
    ]
    if extra:
        raise UnsafeFile(
            "index", f"{where} does not list these tensors: {_some(extra)}; write the index again"
        )


def _check_total(index: dict[str, Any], whole: Sharded, where: str, limits: Limits) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is None:
        return
    if isinstance(total, bool) or not isinstance(total, int | float):
        raise UnsafeFile("total-size", f"{where}: total_size is not a number; write the index again")
    sizes = whole.tensors
    tied = sum(sizes[name].nbytes for name in whole.aliases.values())  # some writers count a tie twice
    low, high = whole.nbytes * (1 - limits.total_size_slack), whole.nbytes + tied
    if not low <= total <= high * (1 + limits.total_size_slack):
        raise UnsafeFile(
            "total-size",
            f"{where} says total_size {total:,} but the tensors have {whole.nbytes:,} bytes; fetch the "
            "checkpoint again, or raise Limits.total_size_slack",
        )


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
