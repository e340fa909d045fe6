"""Threads that share nested work: order, errors, no deadlock; and the budget they share."""

from __future__ import annotations

import _thread
import random
import threading
import time
from contextvars import ContextVar

import pytest

from weft.engine.budget import Budget, default_memory, parse_size, show_size
from weft.engine.pool import WorkPool
from weft.errors import UsageError

THREADS = [1, 2, 3, 8]


@pytest.mark.parametrize("threads", THREADS)
def test_results_in_order(threads: int) -> None:
    def slow(i: int) -> int:
        time.sleep(random.random() / 500)
        return i * i

    with WorkPool(threads) as pool:
        assert pool.map(slow, range(100)) == [i * i for i in range(100)]
        assert pool.map(slow, []) == []
        assert pool.map(slow, [3]) == [9]


@pytest.mark.parametrize("threads", THREADS)
def test_nested_maps_finish(threads: int) -> None:
    with WorkPool(threads) as pool:

        def tree(depth: int) -> int:
            return 1 if depth == 0 else sum(pool.map(tree, [depth - 1] * 3))

        assert tree(6) == 3**6


@pytest.mark.parametrize("threads", THREADS)
def test_nested_maps_under_locks_and_a_budget(threads: int) -> None:
    """As a merge does: statistics under a lock, computed by a map, inside a map over tensors."""
    locks = [threading.Lock() for _ in range(4)]
    budget = Budget(4)
    with WorkPool(threads) as pool:

        def piece(i: int) -> int:
            with budget.holding(1):
                time.sleep(0.0005)
            return i

        def tensor(i: int) -> int:
            with locks[i % 4]:
                found = sum(pool.map(piece, range(8)))
            return found + sum(pool.map(piece, range(5)))

        assert pool.map(tensor, range(30)) == [38] * 30
    assert budget.used == 0
    assert budget.peak <= min(4, threads)


def test_threads_really_share(threads: int = 4) -> None:
    together = threading.Barrier(threads, timeout=10)
    with WorkPool(threads) as pool:
        pool.map(lambda _: together.wait(), range(threads))  # would time out were one missing


def test_many_short_maps_lose_no_thread() -> None:
    """A helper that looked for work just as the last item went must stay alive."""
    died: list[object] = []
    hook, threading.excepthook = threading.excepthook, died.append
    try:
        with WorkPool(8) as pool:
            for _ in range(3000):
                pool.map(abs, [1, 2])
            assert threading.active_count() >= 8
    finally:
        threading.excepthook = hook
    assert died == []


@pytest.mark.parametrize("threads", THREADS)
def test_an_error_stops_the_handing_out(threads: int) -> None:
    done: list[int] = []

    def fails(i: int) -> None:
        if i == 10:
            raise KeyError(i)
        time.sleep(0.001)
        done.append(i)

    with WorkPool(threads) as pool:
        with pytest.raises(KeyError, match="10"):
            pool.map(fails, range(1000))
        assert len(done) < 10 + 10 * threads
        assert pool.map(abs, [-1, -2]) == [1, 2]  # still usable


@pytest.mark.parametrize("threads", THREADS)
def test_errors_come_through_nested_maps(threads: int) -> None:
    with WorkPool(threads) as pool:

        def inner(i: int) -> int:
            if i == 5:
                raise ValueError("deep inside")
            return i

        with pytest.raises(ValueError, match="deep inside"):
            pool.map(lambda _: pool.map(inner, range(10)), range(10))


@pytest.mark.parametrize("threads", THREADS)
def test_keyboard_interrupt(threads: int) -> None:
    """Ctrl-C reaches the main thread while it works or waits; nobody is at work any more afterwards."""
    running = threading.Semaphore(0)
    busy = 0

    def work(i: int) -> None:
        nonlocal busy
        busy += 1
        if i == 3:
            _thread.interrupt_main()
        time.sleep(0.02)
        busy -= 1
        running.release()

    pool = WorkPool(threads)
    with pytest.raises(KeyboardInterrupt), pool:
        pool.map(work, range(1000))
    finished = running._value
    time.sleep(0.1)
    assert running._value == finished < 100


def test_helpers_see_the_caller_s_context() -> None:
    setting: ContextVar[int] = ContextVar("setting", default=0)
    together = threading.Barrier(4, timeout=10)

    def see(_: int) -> int:
        together.wait()
        return setting.get()

    with WorkPool(4) as pool:
        setting.set(7)
        assert pool.map(see, range(4)) == [7] * 4
        setting.set(8)
        assert pool.map(see, range(4)) == [8] * 4


def test_budget_makes_threads_wait() -> None:
    budget, at_once, most = Budget(10), 0, 0
    guard = threading.Lock()

    def work(n: int) -> None:
        nonlocal at_once, most
        with budget.holding(n):
            with guard:
                at_once += n
                most = max(most, at_once)
            time.sleep(0.001)
            with guard:
                at_once -= n

    with WorkPool(8) as pool:
        pool.map(work, [random.randint(1, 10) for _ in range(200)])
    assert most <= 10
    assert (budget.used, at_once) == (0, 0)
    assert budget.peak == most
    assert budget.try_hold(10)
    assert not budget.try_hold(1)
    budget.free(10)
    with pytest.raises(ZeroDivisionError), budget.holding(10):
        raise ZeroDivisionError
    assert budget.used == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("500MB", 500 * 10**6), (" 4 g ", 4 << 30), ("1.5k", 1536), ("7", 7), (123, 123)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 apples", "1.2.3", -5, True])
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_sizes_are_shown() -> None:
    assert [show_size(n) for n in (0, 1023, 1 << 20, 1610612736, 1 << 50)] == [
        "0 B", "1023 B", "1.0 MiB", "1.5 GiB", "1024.0 TiB",
    ]  # fmt: skip
    assert default_memory() > 1 << 26
