"""What is forgotten of files larger than memory, and that nothing is of files that fit."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from weft.checkpoints import sources
from weft.checkpoints.sources import LocalSource
from weft.checkpoints.trail import Trail, memory

KIB = 1 << 10


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> Trail:
    found = Trail(512 * KIB)
    monkeypatch.setattr(sources, "TRAIL", found)
    return found


def opened(
    folder: Path, size: int, dropped: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> LocalSource:
    path = folder / "weights"
    path.write_bytes(bytes(size))
    monkeypatch.setattr(LocalSource, "forget", lambda self, offset, length: dropped.append((offset, length)))
    return LocalSource(path)


def test_the_oldest_ranges_go_and_an_eighth_of_the_memory_stays(
    tmp_path: Path, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []
    source = opened(tmp_path, 300 * KIB, dropped, monkeypatch)
    for i in range(8):
        source.read_into(memoryview(bytearray(16 * KIB)), i * 16 * KIB)
    assert dropped == [(i * 16 * KIB, 16 * KIB) for i in range(4)]


def test_files_that_fit_are_left_alone_and_closed_files_do_not_count(
    tmp_path: Path, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[tuple[int, int]] = []
    source = opened(tmp_path, 200 * KIB, dropped, monkeypatch)
    again = LocalSource(tmp_path / "weights")  # the same file counts once
    for _ in range(8):
        source.read_into(memoryview(bytearray(100 * KIB)), 0)
    assert not dropped and not trail.crowded()
    (tmp_path / "more").write_bytes(bytes(100 * KIB))
    more = LocalSource(tmp_path / "more")
    assert trail.crowded()
    del more, again
    gc.collect()
    assert not trail.crowded()


def test_where_the_memory_is_unknown_nothing_is_forgotten(tmp_path: Path) -> None:
    assert memory() > 1 << 28
    trail = Trail(0)
    trail.opened((0, 0), 1 << 60)
    assert not trail.crowded()


def test_a_real_range_is_given_back_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 64)
    source, buffer = LocalSource(tmp_path / "f"), bytearray(1 << 14)
    source.forget(0, 1 << 14)
    source.read_into(memoryview(buffer), 0)
    assert buffer == bytes(range(256)) * 64
