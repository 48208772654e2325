"""When to send a request again, and how long to wait before: exponential backoff with jitter."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

from jobs.errors import BasicError

RETRIED_STATUS_CODES = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 8.0


class ServiceBusy(Exception):
    """The service can't answer now: `error` is what to raise when no time is left, `retry_after` the header."""

    def __init__(self, error: BasicError, retry_after: str | None) -> None:
        self.error = error
        self.retry_after = retry_after


class Backoff:
    """The pauses between the attempts of one call: each longer than the last, `patience_s` in total."""

    def __init__(self, patience_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        self._sleep = sleep
        self._left_s = patience_s
        self._next_s = _FIRST_PAUSE_S

    async def pause_or_raise(self, error: BasicError, retry_after: str | None = None) -> None:
        """Sleep before the next attempt; raise the error if the pause would exceed the time left."""
        pause_s = max(_retry_after_s(retry_after), self._next_s * random.uniform(0.5, 1.0))
        if pause_s > self._left_s:
            raise error
        self._left_s -= pause_s
        self._next_s = min(2 * self._next_s, _MAX_PAUSE_S)
        await self._sleep(pause_s)


def _retry_after_s(retry_after: str | None) -> float:
    """Return the seconds of a `Retry-After` header, which is a number or a date."""
    try:
        if retry_after is None or retry_after.replace(".", "", 1).isdecimal():
            return float(retry_after or 0)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
