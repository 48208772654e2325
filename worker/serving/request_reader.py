"""Requests to token ids, on threads beside the engine's; short ones first, the longest last.

Templates and tokenizers take as long as a prompt makes them, and the engine has leases to renew and texts to write
meanwhile. Short requests have a thread of their own, so that no long one holds them up.
"""

from __future__ import annotations

import ctypes
import heapq
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from jobs.errors import InvalidValue
from jobs.messages import GenerationRequest
from storage.records import Claim
from worker.text.codec import Codec, read_request

_SHORT_CHARS = 20_000
_CHARS_A_PLACE = 20_000  # a long request waits for one that comes later only if that is so much shorter
_CLOSE_S = 3.0
_MAX_READ_S = 120.0  # that a request may take; what takes longer never ends


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request as the engine takes it."""

    request: GenerationRequest
    prompts: list[list[int]]


ReadResult = tuple[Claim, ParsedRequest | BaseException]  # what became of a claim


class ReadingTooLong(InvalidValue):
    """Reading this request took too long in the chat template or the tokenizer; shorten it."""


class RequestReader:
    """Reads for one runner, which alone calls this."""

    def __init__(self, codec: Codec) -> None:
        """Start with nothing to read; threads run only while there is something."""
        self._codec = codec
        self._results: queue.SimpleQueue[ReadResult] = queue.SimpleQueue()
        self._short, self._long = _ReaderThread(self._read), _ReaderThread(self._read)
        self._short_open = self._open = 0  # requests whose results have not been taken
        self._numbers = count()

    def put(self, claim: Claim) -> None:
        """Queue a request to be read."""
        chars = _chars(claim.body)
        self._open += 1
        self._short_open += chars <= _SHORT_CHARS
        lane = self._short if chars <= _SHORT_CHARS else self._long
        lane.put(next(self._numbers) + chars / _CHARS_A_PLACE, claim)

    def take(self, short_s: float = 0.0, any_s: float = 0.0) -> list[ReadResult]:
        """Return what has been read: after `short_s`, or as soon as all short requests are, or `any_s` for any."""
        now = time.monotonic()
        for lane in (self._short, self._long):
            lane.end_overdue(now)
        taken: list[ReadResult] = []
        while self._open:
            left = now + (short_s if self._short_open else 0.0 if taken else any_s) - time.monotonic()
            try:
                one = self._results.get(timeout=left) if left > 0 else self._results.get_nowait()
            except queue.Empty:
                break
            self._open -= 1
            self._short_open -= _chars(one[0].body) <= _SHORT_CHARS
            taken.append(one)
        return taken

    def close(self) -> None:
        """Stop reading, and wait a while for what is being read: a process must not end in the midst of it."""
        for lane in (self._short, self._long):
            lane.close(_CLOSE_S)

    def _read(self, claim: Claim) -> None:
        try:
            request = read_request(claim.body)
            result: ParsedRequest | BaseException = ParsedRequest(
                request, self._codec.encode_all(request, claim.endpoint)
            )
        except BaseException as error:  # also what Rust raises; all of it belongs to this request
            result = error
        self._results.put((claim, result))


@dataclass(slots=True)
class _ReaderThread:
    """One thread that reads claims in order; it ends when there are none."""

    read: Callable[[Claim], None]
    _waiting: list[tuple[float, int, Claim]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None
    _began_at: float | None = None

    def put(self, place: float, claim: Claim) -> None:
        with self._lock:
            heapq.heappush(self._waiting, (place, next(self._numbers), claim))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="basic-reader", daemon=True)
                self._thread.start()

    def end_overdue(self, now: float) -> None:
        """Raise ReadingTooLong in a thread whose claim takes too long, as soon as it runs Python code."""
        with self._lock:
            thread, began_at = self._thread, self._began_at
            if thread is None or began_at is None or now - began_at < _MAX_READ_S:
                return
            self._began_at = now
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread.ident or 0), ctypes.py_object(ReadingTooLong)
            )

    def close(self, timeout_s: float) -> None:
        with self._lock:
            self._waiting.clear()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with suppress(ReadingTooLong):  # it came late, behind what it was for
                claim = self._next()
                if claim is None:
                    return
                self.read(claim)

    def _next(self) -> Claim | None:
        with self._lock:
            if not self._waiting:
                self._thread = self._began_at = None
                return None
            *_, claim = heapq.heappop(self._waiting)
            self._began_at = time.monotonic()
            return claim


def _chars(body: Any) -> int:
    """Return the characters, or token ids, that a stored request holds; what can't be counted is short."""
    try:
        messages, prompts = body.get("messages") or (), body.get("prompts") or ()
        return (
            len(body.get("prompt") or "")
            + sum(map(len, prompts))
            + sum(len(message["content"]) for message in messages)
        )
    except Exception:  # reading it will say what is wrong
        return 0
