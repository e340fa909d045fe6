"""Interruptions: whatever stops a save, the same call goes on and gives the same bytes, under no false name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import SOURCE, contents, family, sha, state, write_model

import weft
from weft.engine import staging as staging_module
from weft.engine import writer
from weft.engine.staging import JOURNAL
from weft.errors import DataError, UsageError

TENSORS = 6

MERGE = """
import os, signal, sys, time
import weft

folder, method, after, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
done = 0

def on_event(event):
    global done
    done += event["event"] == "tensor"
    if event["event"] == "tensor" and how == "slowly":
        if done == after:
            print("going", flush=True)
        time.sleep(0.5)
        return
    if event["event"] == "tensor" and done == after:
        if how == "wait":
            print("waiting", flush=True)
            time.sleep(60)
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(30)

merged = weft.merge([f"{folder}/tuned0", f"{folder}/tuned1"], method, base=f"{folder}/base", density=0.3)
saved = weft.save(merged, f"{folder}/out", threads=int(sys.argv[5]), shard_size=100_000, on_event=on_event)
print("resumed", saved.resumed)
"""


def start(folder: Path, after: int = 0, how: str = "SIGKILL", threads: int = 2) -> Any:
    return subprocess.Popen(
        [sys.executable, "-c", MERGE, str(folder), "ties", str(after), how, str(threads)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def merge(folder: Path, **params: Any) -> weft.Checkpoint:
    params = {"density": 0.3, **params}
    return weft.merge([folder / "tuned0", folder / "tuned1"], "ties", base=folder / "base", **params)


def save(folder: Path, out: str = "out", **more: Any) -> Any:
    return weft.save(merge(folder), folder / out, threads=2, shard_size=100_000, **more)


def partial(folder: Path) -> Path:
    return folder / ".out.weft-partial"


def journalled(folder: Path) -> list[str]:
    return (partial(folder) / JOURNAL).read_text().splitlines()[1:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    family(tmp_path)
    return tmp_path


@pytest.fixture
def expected(folder: Path) -> dict[str, str]:
    save(folder, "expected")
    return contents(folder / "expected")


class Stop(Exception):
    pass


def stop_after(n: int) -> Any:
    """An on_event that raises at the n-th tensor."""
    seen = 0

    def on_event(event: Any) -> None:
        nonlocal seen
        seen += event["event"] == "tensor"
        if event["event"] == "tensor" and seen >= n:
            raise Stop

    return on_event


def interrupt(folder: Path, after: int = 3) -> None:
    """Leave a save half done."""
    with pytest.raises(Stop):
        weft.save(merge(folder), folder / "out", threads=1, shard_size=100_000, on_event=stop_after(after))


# -- killed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_killed_and_started_again(folder: Path, expected: dict[str, str], threads: int) -> None:
    killed = start(folder, after=4, how="SIGKILL", threads=threads)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "out").exists()
    written = len(journalled(folder))
    assert 0 < written < TENSORS
    saved = save(folder)
    assert saved.resumed == written
    assert contents(folder / "out") == expected
    assert not partial(folder).exists()


def test_killed_many_times(folder: Path, expected: dict[str, str]) -> None:
    for attempt in range(20):
        with pytest.raises(Stop):
            weft.save(merge(folder), folder / "out", threads=1, shard_size=100_000, on_event=stop_after(2))
        assert not (folder / "out").exists()
        assert len(journalled(folder)) == attempt + 1  # the second is computed but not yet noted
        if attempt + 1 == TENSORS - 1:
            break
    assert save(folder).resumed == TENSORS - 1
    assert contents(folder / "out") == expected


def test_ctrl_c(folder: Path, expected: dict[str, str]) -> None:
    process = start(folder, after=3, how="SIGINT")
    _, told = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in told
    assert not (folder / "out").exists()
    assert save(folder).resumed > 0
    assert contents(folder / "out") == expected


def test_ctrl_c_at_any_moment(folder: Path, expected: dict[str, str]) -> None:
    """Whichever thread is at work, the main one takes the signal and the others stop at their next range."""
    process = start(folder, after=1, how="slowly")
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode != 0
    assert told.strip().endswith("KeyboardInterrupt")
    assert not (folder / "out").exists()
    assert 0 < save(folder).resumed < TENSORS
    assert contents(folder / "out") == expected


def test_killed_between_the_weights_and_the_name(folder: Path, expected: dict[str, str]) -> None:
    def stop(staging: staging_module.Staging) -> None:
        staging.abandon()
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging_module.Staging, "publish", stop)
        with pytest.raises(Stop):
            save(folder)
    assert not (folder / "out").exists()
    assert save(folder).resumed == TENSORS
    assert contents(folder / "out") == expected


# -- what may not be believed ---------------------------------------------------------------------------


def test_changed_inputs_start_over(folder: Path) -> None:
    interrupt(folder)
    write_model(folder / "tuned1", state(77, like=state()))
    saved = save(folder)
    assert saved.resumed == 0
    save(folder, "fresh")
    assert contents(folder / "out") == contents(folder / "fresh")


@pytest.mark.parametrize("change", [{"density": 0.4}, {"weight": [1.0, 2.0]}, {"seed": 3}])
def test_a_changed_recipe_starts_over(folder: Path, change: dict[str, Any]) -> None:
    interrupt(folder)
    saved = weft.save(merge(folder, **change), folder / "out", shard_size=100_000)
    assert saved.resumed == 0
    weft.save(merge(folder, **change), folder / "fresh", shard_size=100_000)
    assert contents(folder / "out") == contents(folder / "fresh")


def test_another_layout_starts_over(folder: Path) -> None:
    interrupt(folder)
    assert weft.save(merge(folder), folder / "out", shard_size=50_000).resumed == 0


def test_models_in_memory_are_not_resumed(tmp_path: Path) -> None:
    merged = weft.merge([state(1), state(2)], "linear")
    with pytest.raises(Stop):
        weft.save(merged, tmp_path / "out", threads=1, on_event=stop_after(3))
    assert weft.save(merged, tmp_path / "out").resumed == 0


def test_a_restarted_machine_starts_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(folder)
    monkeypatch.setattr(staging_module, "_boot", lambda: "another boot")
    assert save(folder).resumed == 0


def spoil_head(journal: Path) -> None:
    journal.write_bytes(b"\x00\xff" + journal.read_bytes())


def spoil_middle(journal: Path) -> None:
    first, second, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first, second[:3] + b"\n", *rest]))


def no_journal(journal: Path) -> None:
    journal.unlink()


def empty_journal(journal: Path) -> None:
    journal.write_bytes(b"")


def not_names(journal: Path) -> None:
    with journal.open("a") as f:
        f.write('["a"]\n{"b": 1}\n3\n')


def deep_nonsense(journal: Path) -> None:
    with journal.open("a") as f:
        f.write("[" * 100_000 + "\n")


@pytest.mark.parametrize(
    "spoil", [spoil_head, spoil_middle, no_journal, empty_journal, not_names, deep_nonsense]
)
def test_a_spoiled_journal_starts_over(folder: Path, expected: dict[str, str], spoil: Any) -> None:
    interrupt(folder)
    spoil(partial(folder) / JOURNAL)
    assert save(folder).resumed == 0
    assert contents(folder / "out") == expected


@pytest.mark.parametrize("tail", ['"layers.1.no', '"', '"layers.1.norm.weight"'])
def test_a_cut_last_line_is_ignored(folder: Path, expected: dict[str, str], tail: str) -> None:
    """Also by the run after the next: what it appends must not join the torn line."""
    interrupt(folder)
    written = len(journalled(folder))
    with (partial(folder) / JOURNAL).open("a") as f:
        f.write(tail)
    with pytest.raises(Stop):
        weft.save(merge(folder), folder / "out", threads=1, shard_size=100_000, on_event=stop_after(2))
    assert len(journalled(folder)) == written + 1
    assert save(folder).resumed == written + 1
    assert contents(folder / "out") == expected


def test_unknown_names_in_the_journal_are_ignored(folder: Path, expected: dict[str, str]) -> None:
    interrupt(folder)
    written = len(journalled(folder))
    with (partial(folder) / JOURNAL).open("a") as f:
        f.write('"no.such.tensor"\n')
    assert save(folder).resumed == written
    assert contents(folder / "out") == expected


@pytest.mark.parametrize("damage", ["gone", "short", "long", "header"])
def test_damaged_shards_are_written_again(folder: Path, expected: dict[str, str], damage: str) -> None:
    interrupt(folder, after=5)
    for shard in sorted((partial(folder) / "files").glob("*.safetensors")):
        if damage == "gone":
            shard.unlink()
        elif damage == "short":
            os.truncate(shard, 10)
        elif damage == "long":
            os.truncate(shard, shard.stat().st_size + 1)
        else:  # killed after the file had its size and before its header was written
            with shard.open("r+b") as f:
                f.write(b"\0" * 50)
    saved = save(folder)
    assert (saved.resumed > 0) == (damage == "header")
    assert contents(folder / "out") == expected


def test_a_link_in_place_of_the_hidden_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis").write_text("x")
    partial(folder).symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link"):
        save(folder)
    assert (tmp_path / "mine/thesis").read_text() == "x"


# -- two at once ------------------------------------------------------------------------------------------


def test_two_processes_at_once(folder: Path, expected: dict[str, str]) -> None:
    first = start(folder, after=2, how="wait")
    try:
        assert first.stdout.readline() == "waiting\n"
        with pytest.raises(UsageError, match="another weft is writing"):
            save(folder)
        save(folder, "other")  # another name is free
    finally:
        first.kill()
        first.communicate()
    save(folder)
    assert contents(folder / "out") == contents(folder / "other") == expected


def test_a_failed_save_lets_go(folder: Path) -> None:
    """In one process: the lock of an aborted save must not lock out the next."""
    for _ in range(3):
        interrupt(folder, after=1)
    out = folder / "out"

    def appears(event: Any) -> None:
        if event["event"] == "tensor":
            out.mkdir(exist_ok=True)
            (out / "config.json").write_text("{}")

    for _ in range(2):
        with pytest.raises(UsageError, match="exists and is not empty"):
            save(folder, on_event=appears)
    shutil.rmtree(out)
    assert save(folder).resumed == TENSORS


# -- disks ----------------------------------------------------------------------------------------------


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk(
    folder: Path, expected: dict[str, str], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer.os, call, full)
        with pytest.raises(DataError, match=r"model-00001.*no room for [\d,]+ bytes.*same command again"):
            save(folder)
    assert not (folder / "out").exists()
    save(folder)
    assert contents(folder / "out") == expected


def test_a_disk_that_fills_up_later(
    folder: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.pwrite, 0

    def some(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        # half a write, then none: what a disk does that fills up
        return full() if calls > 6 else real(fd, data[: max(1, len(data) // 2)], offset)

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "pwrite", some)
        with pytest.raises(DataError, match="no room"):
            save(folder)
    assert not (folder / "out").exists()
    save(folder)
    assert contents(folder / "out") == expected


@pytest.mark.parametrize("call", ["fsync", "write_whole"])
def test_a_disk_that_fails_at_the_end(folder: Path, expected: dict[str, str], call: str) -> None:
    def broken(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        if call == "fsync":
            patch.setattr(writer.os, "fsync", broken)
        else:
            patch.setattr(Path, "replace", broken)
        with pytest.raises(DataError, match="Input/output error"):
            save(folder)
    assert not (folder / "out").exists()
    assert save(folder).resumed == TENSORS
    assert contents(folder / "out") == expected


def test_a_limit_on_file_sizes(folder: Path) -> None:
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n{MERGE}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), "ties", "0", "", "2"],
        env={**os.environ, "PYTHONPATH": SOURCE}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no room for" in done.stderr.splitlines()[-1]
    assert not (folder / "out").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip("cannot mount a disk here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(folder: Path, tiny_disk: Path) -> None:
    with pytest.raises(DataError, match="no room for"):
        weft.save(merge(folder), tiny_disk / "out", shard_size=50_000)
    assert not (tiny_disk / "out").exists()


def test_an_unwritable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    # root may write anywhere, so the refusal is made here
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(DataError, match=r"cannot be written .Permission denied.*may write to"):
        save(folder)


def test_a_file_in_the_way_of_the_folder(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(DataError, match=str(folder / "file")):
        weft.save(merge(folder), folder / "file/out")


# -- inputs that change -----------------------------------------------------------------------------------


def test_an_input_that_shrinks_midway(folder: Path) -> None:
    victim = folder / "tuned1/model.safetensors"

    def cut(event: Any) -> None:
        if event["event"] == "tensor":
            os.truncate(victim, victim.stat().st_size // 2)

    with pytest.raises(DataError, match=r"tuned1/model.safetensors.*changed while being read"):
        weft.save(merge(folder), folder / "out", threads=1, on_event=cut)
    assert not (folder / "out").exists()


def test_an_input_that_is_replaced_midway(folder: Path) -> None:
    """The open file is still whole, but what the manifest would hash is not what was merged."""

    def replace(event: Any) -> None:
        if event["event"] == "tensor" and event["name"] == "scale":
            write_model(folder / "new", state(5, like=state()))
            (folder / "new/model.safetensors").replace(folder / "tuned1/model.safetensors")

    with pytest.raises(DataError, match="changed while they were merged"):
        save(folder, on_event=replace)
    assert not (folder / "out").exists()
    assert save(folder).resumed == 0


def test_an_input_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge(folder)

    def broken(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(DataError, match=r"model.safetensors cannot be read: Input/output error"):
        weft.save(merged, folder / "out")


def test_inputs_are_not_written_to(folder: Path) -> None:
    before = {p: (sha(p), p.stat().st_mtime_ns) for p in folder.rglob("*.safetensors")}
    interrupt(folder)
    save(folder)
    assert all((sha(p), p.stat().st_mtime_ns) == was for p, was in before.items())


def test_the_journal_is_plain(folder: Path) -> None:
    interrupt(folder, after=3)
    head, *names = (partial(folder) / JOURNAL).read_text().splitlines()
    assert json.loads(head).keys() == {"fingerprint", "boot", "weft"}
    assert set(map(json.loads, names)) <= set(state())


def test_threads_do_not_outlive_a_failed_save(folder: Path) -> None:
    import threading

    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(Stop):
            save(folder, on_event=stop_after(2))
    assert threading.active_count() == before
    assert torch.get_num_threads() > 0
