"""Threads that share work without ever waiting for work that nobody has begun.

`WorkPool.map` runs in the calling thread and invites idle threads to help; a map inside a map is safe,
since the caller alone could always finish it. Jobs see the caller's context (execution, settings).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Job:
    """One map: items handed out one at a time, results in order, the first error kept."""

    def __init__(self, fn: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.fn, self.items = fn, items
        self.context = copy_context()
        self.results: list[Any] = [None] * len(items)
        self.next = 0
        self.unfinished = len(items)
        self.error: BaseException | None = None
        self.changed = threading.Condition()

    def work(self) -> None:
        """Take items until none is left."""
        while True:
            with self.changed:
                if self.next >= len(self.items):
                    return
                i = self.next
                self.next += 1
            try:
                self.results[i] = self.fn(self.items[i])
            except BaseException as error:
                self.stop(error)
            with self.changed:
                self.unfinished -= 1
                self.changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """Hand out no more items."""
        with self.changed:
            self.error = error if self.error is None else self.error
            self.unfinished -= len(self.items) - self.next
            self.next = len(self.items)

    def finish(self) -> list[Any]:
        """Wait for items others have begun; raise the first error."""
        with self.changed:
            # woken by every item, not by the last alone; a timeout keeps the main thread able to take Ctrl-C
            while self.unfinished:
                self.changed.wait(timeout=0.2)
        if self.error is not None:
            raise self.error
        return self.results


class WorkPool:
    """`threads` threads in all, the caller of `map` included."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._jobs: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._helpers = [
            threading.Thread(target=self._help, name=f"weft-{i}", daemon=True)
            for i in range(self.threads - 1)
        ]
        for thread in self._helpers:
            thread.start()

    def map(self, fn: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`[fn(i) for i in items]`, shared among the threads. The first error stops the handing out."""
        if len(items) <= 1 or self.threads == 1:
            return [fn(item) for item in items]
        job = _Job(fn, items)
        with self._wake:
            self._jobs.appendleft(job)  # the innermost map first: it is what somebody waits for
            self._wake.notify_all()
        try:
            job.work()
            return job.finish()
        except BaseException as error:
            job.stop(error)
            raise
        finally:
            with self._wake:
                if job in self._jobs:
                    self._jobs.remove(job)

    def _open_job(self) -> _Job | None:
        return next((j for j in self._jobs if j.next < len(j.items)), None)

    def _help(self) -> None:
        while True:
            with self._wake:
                # looked up once: between two looks another thread may take a job's last item
                while (job := self._open_job()) is None and not self._closed:
                    self._wake.wait()
                if job is None:
                    return
            job.context.copy().run(job.work)

    def __enter__(self) -> WorkPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._helpers:
            thread.join()
