"""Messages between the engine and the request loop. They are pickled on the way."""

from __future__ import annotations

from dataclasses import dataclass

from storage.cached_answers import CacheScope
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stats import StepBatch
from worker.settings import WorkerSettings
from worker.text.codec import CodecOptions


@dataclass(frozen=True, slots=True)
class AddSequences:
    """To the engine: decode these sequences. Later messages name them by their numbers."""

    sequences: tuple[EngineSequence, ...]


@dataclass(frozen=True, slots=True)
class CancelSequences:
    """To the engine: end these sequences without another token; unknown numbers are ignored."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReportsRead:
    """To the engine: `count` more reports have been read. The engine pauses while too many are unread."""

    count: int


@dataclass(frozen=True, slots=True)
class ActiveRequests:
    """To the engine: the request loop runs and holds `num_requests` requests."""

    num_requests: int


@dataclass(frozen=True, slots=True)
class EngineReport:
    """From the engine: what it can take and what it has done. Each report proves that it has not hung."""

    num_added: int  # sequences that it has got so far
    free_capacity: int  # sequences that it can take beside them
    ended_at: float  # Unix seconds
    notified: bool = False  # new work may be waiting in the database
    results: StepBatch | None = None
    given_up: tuple[tuple[int, str], ...] = ()  # number and reason of sequences that it can't decode


@dataclass(frozen=True, slots=True)
class Setup:
    """From the worker: how to serve. The first message to a request process."""

    settings: WorkerSettings
    worker_id: str
    model: str
    codec: CodecOptions
    reserved: int  # slots that are kept for interactive requests
    numerics: str | None = None  # fingerprint of what fixes the bits of its texts
    cache_scope: CacheScope | None = None  # what decides its answers; None: none is copied


@dataclass(frozen=True, slots=True)
class HandBack:
    """From the worker, after the last report: commit all progress, release all requests, and end."""

    timeout_s: float


ToEngine = AddSequences | CancelSequences | ReportsRead | ActiveRequests
ToRequests = EngineReport | Setup | HandBack
