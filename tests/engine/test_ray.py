"""On a Ray cluster of two workers: the same bytes, whoever dies meanwhile."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import SOURCE, contents, family, state

import weft
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.lazy import Derived
from weft.engine.ray import grouped
from weft.engine.save import Settings
from weft.engine.staging import JOURNAL
from weft.errors import DataError, MissingExtra

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One small cluster for all tests of this file; loopback only, so it needs no key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([SOURCE, str(Path(__file__).parent)]))
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            _node_ip_address="127.0.0.1", object_store_memory=100 << 20,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


class Dying(Derived):
    """Kills the process that reads the named tensor, unless `marker` shows that it has happened."""

    def __init__(self, source: Checkpoint, name: str, marker: Path, times: int = 1) -> None:
        super().__init__(source)
        self.origin = source.origin
        self.name, self.marker, self.times, self.driver = name, marker, times, os.getpid()

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dtype: Any = None) -> torch.Tensor:
        if name == self.name and os.getpid() != self.driver:
            died = len(self.marker.read_text()) if self.marker.exists() else 0
            if died < self.times:
                self.marker.write_text("x" * (died + 1))
                os._exit(1)
        return self.first.read(name, start, stop, dtype=dtype)


class Marked(Derived):
    """Notes which process reads each tensor."""

    def __init__(self, source: Checkpoint, folder: Path) -> None:
        super().__init__(source)
        self.origin, self.folder = source.origin, folder

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dtype: Any = None) -> torch.Tensor:
        (self.folder / f"{name}.{os.getpid()}").touch()
        return self.first.read(name, start, stop, dtype=dtype)


def merge(folder: Path, wrap: Any = lambda checkpoint: checkpoint, **params: Any) -> Checkpoint:
    tuned = [wrap(weft.load(folder / "tuned0")), folder / "tuned1"]
    return weft.merge(tuned, "ties", base=folder / "base", **{"density": 0.3, "scope": "model", **params})


def save(checkpoint: Checkpoint, out: Path, executor: str = "ray", **more: Any) -> Any:
    return weft.save(checkpoint, out, executor=executor, threads=2, shard_size=100_000, **more)


@pytest.mark.ray
@pytest.mark.parametrize("params", [{}, {"scope": "tensor", "density": [0.2, 0.6]}], ids=["model", "tensor"])
def test_same_bytes_as_on_one_machine(cluster: None, tmp_path: Path, params: dict[str, Any]) -> None:
    family(tmp_path)
    events: list[Any] = []
    saved = save(merge(tmp_path, **params), tmp_path / "ray", on_event=events.append)
    save(merge(tmp_path, **params), tmp_path / "local", executor="local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert saved.resumed == 0
    written = [e["name"] for e in events if e["event"] == "tensor"]
    assert sorted(written) == sorted(state())


@pytest.mark.ray
def test_relative_paths(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family(Path())
    save(merge(Path()), Path("ray"))
    save(merge(Path()), Path("local"), executor="local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.ray
def test_workers_do_the_work(cluster: None, tmp_path: Path) -> None:
    family(tmp_path)
    (tmp_path / "readers").mkdir()
    node = merge(tmp_path, lambda c: Marked(c, tmp_path / "readers"), scope="tensor")
    save(node, tmp_path / "out")
    readers = {int(p.name.rpartition(".")[2]) for p in (tmp_path / "readers").iterdir()}
    assert os.getpid() not in readers
    assert len(readers) == 2


@pytest.mark.ray
def test_a_dying_worker_is_retried(cluster: None, tmp_path: Path) -> None:
    family(tmp_path)
    marker = tmp_path / "died"
    save(merge(tmp_path, lambda c: Dying(c, "layers.1.mlp.weight", marker)), tmp_path / "ray")
    assert marker.read_text() == "x"
    save(merge(tmp_path), tmp_path / "local", executor="local")
    # the manifest and the card are those of the same models; only the test's own node is between
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


@pytest.mark.ray
def test_a_worker_that_always_dies_is_given_up_and_the_rest_kept(cluster: None, tmp_path: Path) -> None:
    family(tmp_path)
    marker = tmp_path / "died"

    def fragile(checkpoint: Checkpoint) -> Checkpoint:
        return Dying(checkpoint, "scale", marker, times=5)

    with pytest.raises(DataError, match=r"worker that wrote 'scale'.*failed 4 times.*lower --memory"):
        save(merge(tmp_path, fragile), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = (tmp_path / ".out.weft-partial" / JOURNAL).read_text().splitlines()[1:]
    marker.write_text("x" * 5)
    saved = save(merge(tmp_path, fragile), tmp_path / "out")
    assert saved.resumed == len(written)
    save(merge(tmp_path), tmp_path / "local", executor="local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


class Stop(Exception):
    pass


@pytest.mark.ray
def test_either_executor_goes_on_with_what_the_other_left(cluster: None, tmp_path: Path) -> None:
    family(tmp_path)
    done: list[str] = []

    def stop(event: Any) -> None:
        if event["event"] == "tensor":
            done.append(event["name"])
            if len(done) == 2:
                raise Stop

    with pytest.raises(Stop):  # what a dying driver leaves: a journal of the groups that came back
        save(merge(tmp_path), tmp_path / "a", on_event=stop)
    assert save(merge(tmp_path), tmp_path / "a", executor="local").resumed >= 2
    done.clear()
    with pytest.raises(Stop):
        save(merge(tmp_path), tmp_path / "b", executor="local", on_event=stop)
    assert save(merge(tmp_path), tmp_path / "b").resumed >= 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.ray
def test_errors_arrive_in_weft_s_own_words(cluster: None, tmp_path: Path) -> None:
    family(tmp_path)
    spoiled = state(4, like=state())
    spoiled["layers.0.norm.weight"][5] = float("nan")
    node = weft.merge([tmp_path / "tuned0", spoiled], "linear")
    with pytest.raises(DataError, match=r"^state dict: tensor 'layers\.0\.norm\.weight' has NaN") as error:
        save(node, tmp_path / "out")
    assert type(error.value) is DataError
    assert "Traceback" not in str(error.value)


@pytest.mark.ray
def test_storage_that_is_not_shared_is_noticed(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that finds another folder under the name must not fill it."""
    import weft.engine.ray as executor

    family(tmp_path)
    real = executor._Run.all

    def unshared(run: Any, names: Any) -> None:
        (run.staging.home / "ray-run").write_text("another machine's")
        real(run, names)

    monkeypatch.setattr(executor._Run, "all", unshared)
    with pytest.raises(DataError, match="shared storage"):
        save(merge(tmp_path), tmp_path / "out")


@pytest.mark.ray
def test_an_own_cluster_comes_and_goes(tmp_path: Path) -> None:
    """In a process of its own, killed midway: no Ray is left running, and the same command goes on."""
    from engine_models import python

    family(tmp_path)
    script = """
import os, sys, ray, weft
folder, kill = sys.argv[1:]
done = []
def on_event(event):
    done.append(event)
    if kill == "yes" and event["event"] == "tensor":
        os.kill(os.getpid(), 9)
merged = weft.merge([f"{folder}/tuned0", f"{folder}/tuned1"], "ties", base=f"{folder}/base", density=0.3)
saved = weft.save(merged, f"{folder}/out", executor="ray", threads=2, shard_size=100_000, on_event=on_event)
print(saved.resumed, ray.is_initialized())
"""
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}
    killed = python(script, tmp_path, "yes", **environment)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "out").exists()
    done = python(script, tmp_path, "no", **environment)
    assert done.returncode == 0, done.stderr
    resumed, still_running = done.stdout.split()
    assert int(resumed) > 0
    assert still_running == "False"
    save(merge(tmp_path), tmp_path / "local", executor="local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")


def test_groups_are_balanced(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.zeros(i % 7 * 100 + 1) for i in range(100)}
    plan = Settings(threads=1).plan(weft.load(tensors), tmp_path / "x")
    groups = grouped(plan, list(tensors), 8)
    assert sorted(n for g in groups for n in g) == sorted(tensors)
    loads = [sum(plan.tensors[n].nbytes for n in g) for g in groups]
    assert loads == sorted(loads, reverse=True)
    assert max(loads) - min(loads) <= max(i.nbytes for i in plan.tensors.values())
    assert len(grouped(plan, ["t1", "t2"], 8)) == 2
    assert isinstance(plan.tensors["t1"], TensorInfo)


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--executor ray needs ray: install weft\[ray\]"):
        weft.save({"w": torch.ones(2)}, tmp_path / "out", executor="ray")
