"""Tokenize claimed requests on threads beside the engine's: short requests first, the longest last.

Chat templates and tokenizers can take seconds on a long prompt; the engine thread must renew leases and write output
meanwhile. Short requests have their own thread, so that a long one never delays them.
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
from jobs.messages import AnswerFormat, GenerationRequest
from storage.records import Claim
from worker.engine.grammar.grammar import Grammar
from worker.serving.stored_requests import read_answer_format, read_request
from worker.text.codec import Codec
from worker.text.generation_config import with_defaults

_SHORT_CHARS = 20_000
_CHARS_PER_POSITION = 20_000  # each such part of a long request lets one more later request go first
_CLOSE_S = 3.0
_MAX_READ_S = 120.0  # limit for one request; what takes longer is taken for an endless loop


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A validated request, with the sampling parameters of the model, and the token ids of its prompts."""

    request: GenerationRequest
    prompts: list[list[int]]
    answer_format: AnswerFormat | None  # how its texts split; None: they are the content
    sampling_defaults: dict[str, Any] | None  # sampling parameters of the model that it does not set
    grammar: Grammar | None = None  # of its texts


ReadResult = tuple[Claim, ParsedRequest | BaseException]  # the claim and its result or error


class ReadingTooLong(InvalidValue):
    """Reading this request took too long in the chat template or the tokenizer; shorten it."""


class RequestReader:
    """Read requests for one runner; only the runner's thread calls this."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._results: queue.SimpleQueue[ReadResult] = queue.SimpleQueue()
        self._short, self._long = _ReaderThread(self._read), _ReaderThread(self._read)
        self._num_short = self._num_pending = 0  # requests whose results are not taken yet
        self._numbers = count()

    def put(self, claim: Claim) -> None:
        """Queue a request to be read."""
        chars = _chars(claim.body)
        self._num_pending += 1
        self._num_short += chars <= _SHORT_CHARS
        thread = self._short if chars <= _SHORT_CHARS else self._long
        thread.put(next(self._numbers) + chars / _CHARS_PER_POSITION, claim)

    def take(self, short_s: float = 0.0, any_s: float = 0.0) -> list[ReadResult]:
        """Return the requests that are read.

        Wait up to `short_s` for the short ones that are pending, and up to `any_s` for the first of any length.
        """
        now = time.monotonic()
        for thread in (self._short, self._long):
            thread.interrupt_overdue(now)
        taken: list[ReadResult] = []
        while self._num_pending:
            left = now + (short_s if self._num_short else 0.0 if taken else any_s) - time.monotonic()
            try:
                one = self._results.get(timeout=left) if left > 0 else self._results.get_nowait()
            except queue.Empty:
                break
            self._num_pending -= 1
            self._num_short -= _chars(one[0].body) <= _SHORT_CHARS
            taken.append(one)
        return taken

    def close(self) -> None:
        """Drop waiting requests and wait briefly for the current ones: the process must not end in the tokenizer."""
        for thread in (self._short, self._long):
            thread.close(_CLOSE_S)

    def _read(self, claim: Claim) -> None:
        try:
            result: ParsedRequest | BaseException = self._parse(claim)
        except BaseException as error:  # also panics of Rust; any error is the failure of this request
            result = error
        self._results.put((claim, result))

    def _parse(self, claim: Claim) -> ParsedRequest:
        """Return a request as earlier owners began it, or as this worker's model has it."""
        defaults = (claim.plan.sampling_defaults or {}) if claim.begun else self._codec.sampling_defaults
        request, used = with_defaults(read_request(claim.body), defaults)
        prompts = self._codec.encode_all(request, claim.endpoint)
        if claim.begun:
            form = read_answer_format(claim.plan.answer_format)
        else:
            form = self._codec.answer_format(request, claim.endpoint, prompts[0])
        return ParsedRequest(request, prompts, form, used, self._codec.grammar(request, form))


@dataclass(slots=True)
class _ReaderThread:
    """One thread that reads claims in order; it ends when none waits and is started by the next."""

    read: Callable[[Claim], None]
    _waiting: list[tuple[float, int, Claim]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _thread: threading.Thread | None = None
    _started_at: float | None = None

    def put(self, position: float, claim: Claim) -> None:
        with self._lock:
            heapq.heappush(self._waiting, (position, next(self._numbers), claim))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="basic-reader", daemon=True)
                self._thread.start()

    def interrupt_overdue(self, now: float) -> None:
        """Raise ReadingTooLong in a thread whose claim takes too long; it arrives at the next Python bytecode."""
        with self._lock:
            thread, started_at = self._thread, self._started_at
            if thread is None or started_at is None or now - started_at < _MAX_READ_S:
                return
            self._started_at = now
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
            with suppress(ReadingTooLong):  # it arrived after its request was done
                claim = self._next()
                if claim is None:
                    return
                self.read(claim)

    def _next(self) -> Claim | None:
        with self._lock:
            if not self._waiting:
                self._thread = self._started_at = None
                return None
            *_, claim = heapq.heappop(self._waiting)
            self._started_at = time.monotonic()
            return claim


def _chars(body: Any) -> int:
    """Return about how many characters or token ids a stored request has; 0 if they can't be counted."""
    try:
        messages, prompts = body.get("messages") or (), body.get("prompts") or ()
        return (
            len(body.get("prompt") or "")
            + sum(map(len, prompts))
            + sum(len(str(part)) for part in (*messages, body.get("tools") or ""))
        )
    except Exception:  # an invalid request: reading it reports the error
        return 0
