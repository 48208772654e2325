"""Run database writes in a thread pool of their own, so that waiting writers never block reads.

SQLite allows one write at a time, and the others wait in their threads. In the shared pool they could take all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, ParamSpec, TypeVar

from anyio import CapacityLimiter, Semaphore, move_on_after, to_thread
from anyio.lowlevel import RunVar

from jobs.errors import DatabaseUnavailable

_MAX_WRITERS: Final = 12  # threads; more would only wait for connections and CPU
_WAIT_S: Final = 10.0  # for a free thread

P = ParamSpec("P")
T = TypeVar("T")

_pool: RunVar[tuple[Semaphore, CapacityLimiter]] = RunVar("writers")


async def run_write(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `write` in a writer thread; raise DatabaseUnavailable if none becomes free in time."""
    slots, threads = _of_this_loop()
    with move_on_after(_WAIT_S) as wait:
        await slots.acquire()
    if wait.cancelled_caught:
        raise DatabaseUnavailable
    try:
        return await to_thread.run_sync(partial(write, *args, **kwargs), limiter=threads)
    finally:
        slots.release()


def _of_this_loop() -> tuple[Semaphore, CapacityLimiter]:
    try:
        return _pool.get()
    except LookupError:
        made = Semaphore(_MAX_WRITERS), CapacityLimiter(_MAX_WRITERS)
        _pool.set(made)
        return made
