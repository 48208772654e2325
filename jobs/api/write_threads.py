"""Threads for what writes: calls that wait for the database's writers hold up none that only read.

SQLite lets one write at a time and the others wait, each in a thread. Were these the threads of all calls, a status
could not be read before the writers had their turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, ParamSpec, TypeVar

from anyio import CapacityLimiter, Semaphore, move_on_after, to_thread
from anyio.lowlevel import RunVar

from jobs.errors import DatabaseUnavailable

_MAX_WRITERS: Final = 12  # at once; connections and processors have room for no more that is of use
_WAIT_S: Final = 10.0  # within which a writer must get its thread

P = ParamSpec("P")
T = TypeVar("T")

_turns: RunVar[tuple[Semaphore, CapacityLimiter]] = RunVar("writers")


async def run_write(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function that writes in a thread; raise DatabaseUnavailable if too many write before it."""
    turns, threads = _of_this_loop()
    with move_on_after(_WAIT_S) as wait:
        await turns.acquire()
    if wait.cancelled_caught:
        raise DatabaseUnavailable
    try:
        return await to_thread.run_sync(partial(write, *args, **kwargs), limiter=threads)
    finally:
        turns.release()


def _of_this_loop() -> tuple[Semaphore, CapacityLimiter]:
    try:
        return _turns.get()
    except LookupError:
        made = Semaphore(_MAX_WRITERS), CapacityLimiter(_MAX_WRITERS)
        _turns.set(made)
        return made
