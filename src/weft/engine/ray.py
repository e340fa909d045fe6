"""The executor on a Ray cluster: groups of output tensors become tasks that write into the same files.

The graph travels once, pickled; inputs and output lie on storage that every node sees, so no value ever does.
First passes run on the driver and travel with the graph. A task whose worker dies is started again (writing
a range twice gives the same bytes), and a finished group enters the journal, so that a run whose driver dies
goes on from there, on Ray or without. `memory` bounds what the tasks of all workers hold together, beside
their interpreters.
"""

from __future__ import annotations

import heapq
import logging
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weft.engine.digest import RunningDigest
from weft.engine.plan import Plan
from weft.engine.pool import WorkPool
from weft.engine.save import Event, Settings, Writing, survey, working
from weft.engine.staging import Staging
from weft.engine.writer import PlacedFiles
from weft.errors import DataError, MissingExtra, UsageError, WeftError

GROUPS_PER_WORKER = 4
"""Enough that an early finisher finds more to do, few enough that starting tasks costs nothing."""
RETRIES = 3
_TOKEN = "ray-run"


@dataclass(frozen=True)
class Work:
    """What every task of one run needs."""

    plan: Plan
    folder: Path
    token: str
    kernels: bool


def write_tensors_on_ray(plan: Plan, staging: Staging, how: Settings) -> dict[str, str | None]:
    """Compute and write every tensor that is not written yet, on a cluster; sha256 of the files.

    Uses the Ray that is initialised or that RAY_ADDRESS names, else a local one of `plan.threads` workers
    for the time of the call.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray", "--executor ray") from None

    PlacedFiles(staging.folder, plan.layout).close()  # tasks only find files, and never make one
    names = [n for n in plan.tensors if n not in staging.done]
    if names:
        with working(plan, how):
            survey(plan)
        # a file that no other storage has, by which tasks see that theirs is the driver's
        token = uuid.uuid4().hex
        (staging.home / _TOKEN).write_text(token)
        with _cluster(ray, plan.threads):
            work = Work(replace(plan, threads=1), staging.folder.resolve(), token, how.kernels)
            _Run(ray, work, staging, how).all(names)
    files = list(plan.layout.sizes)
    if not how.digests:
        return dict.fromkeys(files)
    with WorkPool(plan.threads) as pool:
        found = pool.map(
            lambda f: RunningDigest(staging.folder / f, plan.layout, plan.tensors).hexdigest(), files
        )
    return dict(zip(files, found, strict=True))


@contextmanager
def _cluster(ray: Any, workers: int) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            # listens on this machine only; who may connect is Ray's to decide (RAY_AUTH_MODE)
            here = {"address": "local", "_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init(num_cpus=workers, **here, **quiet)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"Ray did not start: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


class _Run:
    """The driver's side: hands out groups, as many at once as workers and memory allow."""

    def __init__(self, ray: Any, work: Work, staging: Staging, how: Settings) -> None:
        self.ray, self.work, self.staging, self.how = ray, work, staging, how
        self.task = ray.remote(num_cpus=1, max_retries=RETRIES)(_write_group)
        # bytes rather than an object: a task that cannot read them says why in weft's own words
        self.graph = ray.put(ray.cloudpickle.dumps(work))
        self.running: dict[Any, tuple[list[str], int]] = {}

    def all(self, names: Sequence[str]) -> None:
        plan = self.work.plan
        workers = max(1, int(self.ray.cluster_resources().get("CPU", 1)))
        waiting = grouped(plan, names, workers * GROUPS_PER_WORKER)
        try:
            while waiting or self.running:
                held = sum(cost for _, cost in self.running.values())
                while waiting and len(self.running) < workers:
                    cost = max(self._cost(n) for n in waiting[0])
                    if self.running and held + cost > plan.memory:
                        break
                    group, held = waiting.pop(0), held + cost
                    self.running[self._submit(group)] = group, cost
                self._collect()
        except BaseException:
            for ref in self.running:
                self.ray.cancel(ref, force=True)
            raise

    def _cost(self, name: str) -> int:
        plan = self.work.plan
        return plan.cost(name, max((b - a for a, b in plan.ranges(name)), default=0))

    def _submit(self, group: list[str]) -> Any:
        # the folder is where relative paths of inputs begin
        return self.task.options(name=f"weft:{group[0]}").remote(
            [self.graph], self.work.token, str(Path.cwd()), group
        )

    def _collect(self) -> None:
        """Note the groups that are done; wait for one if need be."""
        done, _ = self.ray.wait(list(self.running), num_returns=1)
        for ref in done:
            group, _ = self.running[ref]
            try:
                result = self.ray.get(ref)
            except self.ray.exceptions.RayError as error:
                raise DataError(
                    f"a Ray worker that wrote {group[0]!r} and {len(group) - 1} more tensors failed "
                    f"{RETRIES + 1} times (out of memory?): lower --memory, or see Ray's logs; the same "
                    f"command goes on from here. Ray says: {str(error).strip().splitlines()[-1]}"
                ) from None
            del self.running[ref]
            if isinstance(result, Refused):
                raise (UsageError if result.exit_status == 2 else DataError)(result.text)
            self.staging.record(*group)
            for event in result:
                self.how.on_event(event)


def grouped(plan: Plan, names: Sequence[str], count: int) -> list[list[str]]:
    """At most `count` groups of about equal bytes, read and written; heavy ones first.

    Each next largest tensor goes to the lightest group.
    """
    weight = {n: plan.checkpoint.bytes_read(n) + plan.tensors[n].nbytes for n in names}
    groups: list[list[str]] = [[] for _ in range(min(count, len(names)))]
    heap = [(0, i) for i in range(len(groups))]
    for name in sorted(names, key=lambda n: -weight[n]):
        load, i = heapq.heappop(heap)
        groups[i].append(name)
        heapq.heappush(heap, (load + weight[name], i))
    return sorted(groups, key=lambda g: -sum(weight[n] for n in g))


# -- in the worker ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """An error of weft's as it travels: its classes take other arguments than their text."""

    exit_status: int
    text: str


_UNPACKED: dict[str, Work] = {}
"""The work of the run that this process takes part in, by its token."""


def _write_group(graph: list[Any], token: str, cwd: str, names: list[str]) -> list[Event] | Refused:
    """Compute and write tensors; what happened, for the driver to report."""
    try:
        work = _unpacked(graph[0], token, cwd)
        return _write(work, names)
    except WeftError as error:
        return Refused(error.exit_status, str(error))


def _unpacked(graph: Any, token: str, cwd: str) -> Work:
    if token not in _UNPACKED:
        import ray

        try:
            os.chdir(cwd)
        except OSError:
            raise DataError(f"{cwd} is not there on the node {_node()}: Ray needs shared storage") from None
        _UNPACKED.clear()
        _UNPACKED[token] = ray.cloudpickle.loads(ray.get(graph))
    return _UNPACKED[token]


def _write(work: Work, names: list[str]) -> list[Event]:
    try:
        found = (work.folder.parent / _TOKEN).read_text()
    except OSError:
        found = ""
    if found != work.token:
        raise DataError(
            f"{work.folder.parent} on the node {_node()} is not the driver's: Ray needs an output folder on "
            f"shared storage"
        )
    events: list[Event] = []
    needed = sorted({work.plan.layout.places[n].file for n in names})
    files = PlacedFiles(work.folder, work.plan.layout, needed, create=False)
    try:
        with working(work.plan, Settings(kernels=work.kernels, on_event=events.append)) as pool:
            write = Writing(work.plan, files, events.append)
            for name in names:
                write.tensor(name, pool)
        files.sync()  # the driver believes in this group from now on, even if this node dies
    finally:
        files.close()
    return events


def _node() -> str:
    return os.uname().nodename if hasattr(os, "uname") else "of this worker"


__all__ = ["GROUPS_PER_WORKER", "grouped", "write_tensors_on_ray"]
