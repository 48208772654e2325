"""Measure the speed-up of drafts: decode requests of a finished job again, with and without drafts, on an idle engine.

Every request is decoded in two variants whose steps are interleaved: the variant with fewer tokens is next. A plain
step has as many sequences as the step with drafts before it, so that both variants see the same machine load, text
lengths and batch sizes. Without that, the plain texts would all end together and the others one by one. New work
preempts the check; it starts over when the engine is idle again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import Any

from jobs.errors import RequestRefused
from jobs.messages import MESSAGE_VERSION
from storage import speedup_checks
from storage.records import SampledRequest, SpeedupCheckClaim, SpeedupCheckResult
from storage.session import DATABASE_UNAVAILABLE, Database
from worker.engine.sequence import Sequence
from worker.engine.stats import StepResult
from worker.serving.resilient_engine import ResilientEngine
from worker.serving.stored_requests import read_answer_format, read_request
from worker.text.codec import Codec
from worker.text.generation_config import with_defaults
from worker.text.output_stream import OutputStream

log = logging.getLogger(__name__)

_POLL_S = 1.0  # between queries for a job to check
_RENEWALS_PER_LEASE = 3  # how often the claim of a check is renewed per lease time


@dataclass(frozen=True, slots=True)
class _Step:
    """One sequence's share of a step without prefill."""

    ms: float
    tokens: int
    batch_sequences: int


@dataclass(slots=True)
class _Variant:
    """A sampled request, decoded again with drafts or plain."""

    sequence: Sequence
    output_stream: OutputStream
    steps: list[_Step] = field(default_factory=list)  # steps without prefill

    @property
    def key(self) -> Hashable:
        return self.sequence.key

    @property
    def finished(self) -> bool:
        return self.output_stream.finished

    @property
    def ids(self) -> list[int]:
        return self.output_stream.token_ids

    def take(self, result: StepResult) -> None:
        stats = self.output_stream.take(result).stats
        if stats.plain_step_ms is not None:
            batch = stats.batch_sequences
            self.steps.append(_Step(stats.step_ms / batch, stats.emitted_tokens, batch))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A sampled request, with its decoding with drafts and its plain one."""

    text: SampledRequest
    drafted: _Variant
    plain: _Variant

    @property
    def tokens_left(self) -> int:
        """Tokens that its plain variant still has to write."""
        return len(self.text.token_ids) - len(self.plain.ids)

    def row(self, token_ms: Mapping[int, float]) -> SpeedupCheckResult:
        """Return the times of the request: measured with drafts, and the same tokens at the plain rate.

        `token_ms` has the plain time per token and sequence, by batch size.
        """
        steps = self.drafted.steps
        known = bool(steps and token_ms)
        return SpeedupCheckResult(
            request_index=self.text.request_index,
            tokens=sum(step.tokens for step in steps),
            drafted_ms=sum(step.ms for step in steps) if known else None,
            plain_ms=sum(step.tokens * _nearest(token_ms, step.batch_sequences) for step in steps) if known else None,
            batch_sequences=fmean(step.batch_sequences for step in steps) if known else None,
            same_text=all(variant.ids == list(self.text.token_ids) for variant in (self.drafted, self.plain)),
        )


def _nearest(token_ms: Mapping[int, float], batch_sequences: int) -> float:
    """Return the plain time per token at the measured batch size nearest to this one."""
    return token_ms[min(token_ms, key=lambda size: abs(size - batch_sequences))]


class SpeedupCheck:
    """Decode requests of finished jobs again while the engine is idle."""

    def __init__(
        self, engine: ResilientEngine, codec: Codec, database: Database, *, worker_id: str, model: str, lease_s: float
    ) -> None:
        self._engine = engine
        self._codec = codec
        self._database = database
        self._worker_id = worker_id
        self._model = model
        self._lease_s = lease_s
        self._claim: SpeedupCheckClaim | None = None
        self._pairs: list[_Pair] = []
        self._variants: dict[Hashable, _Variant] = {}
        self._run_numbers = count()  # a number for each started check
        self._run_number = 0
        self._unread_texts: deque[SampledRequest] = deque()
        self._capacity = 0
        self._plain_next = False
        self._drafted_batch = 1  # sequences in the last step with drafts
        self._polled_at = self._renewed_at = float("-inf")

    @property
    def busy(self) -> bool:
        """True while a check is running."""
        return self._claim is not None

    @property
    def free_capacity(self) -> int:
        """Sequences that the engine can take, after a preemption if a check is running."""
        return (
            max(1, self._capacity) if self.busy else self._engine.free_capacity
        )  # at least 1: new work must always preempt

    def run_once(self) -> None:
        """Run one step of a check, or start one that is due. Call only while no request is active."""
        if self._claim is None:
            self._poll()
            return
        if self._unread_texts:
            self._read(self._claim, self._unread_texts.popleft())
            self._renew(self._claim)
        elif any(not variant.finished for variant in self._variants.values()):
            self._step()
            self._renew(self._claim)
        else:
            self._store(self._claim)

    def preempt(self) -> None:
        """Free the engine for requests; the check starts over later."""
        if self._claim is None:
            return
        job_id = self._claim.job_id
        self._engine.cancel(set(self._variants))
        self._reset()
        try:
            with self._database.write() as session:
                speedup_checks.release_check(session, job_id)
        except DATABASE_UNAVAILABLE as error:  # don't keep requests waiting: its lease expires instead
            log.warning("Could not release the speed-up check of job %s: %s", job_id, error, extra=_log_extra(job_id))

    def _poll(self) -> None:
        now = time.monotonic()
        if now - self._polled_at < _POLL_S:
            return
        self._polled_at = now
        with self._database.read() as session:
            if not speedup_checks.is_due(session, self._model, MESSAGE_VERSION):
                return
        with self._database.write() as session:
            claim = speedup_checks.claim_check(session, self._model, MESSAGE_VERSION, self._lease_s, self._worker_id)
        if claim is not None:
            self._start(claim)

    def _start(self, claim: SpeedupCheckClaim) -> None:
        self._capacity = self._engine.free_capacity
        self._claim, self._renewed_at, self._plain_next = claim, time.monotonic(), False
        self._run_number = next(self._run_numbers)
        self._unread_texts = deque(claim.texts)

    def _read(self, claim: SpeedupCheckClaim, text: SampledRequest) -> None:
        """Tokenize one request per `run_once`, so that new work waits for one only."""
        try:
            drafted, plain = (self._variant(claim, text, self._run_number, plain) for plain in (False, True))
        except RequestRefused:  # another worker, with higher limits, decoded it
            return
        except Exception:
            log.exception("Request %d can't be compared", text.request_index, extra=_log_extra(claim.job_id))
            return
        # Add both variants of a request together, so that a full engine holds as many of each.
        self._pairs.append(_Pair(text, drafted, plain))
        for variant in (drafted, plain):
            self._variants[variant.key] = variant
            self._engine.add(variant.sequence)

    def _variant(self, claim: SpeedupCheckClaim, text: SampledRequest, run_number: int, plain: bool) -> _Variant:
        """Return a variant of a request's first choice.

        Its group differs from the job's, from that of earlier tries and from that of the plain variants, so that their
        texts do not serve as drafts.
        """
        request, _ = with_defaults(read_request(text.body), text.plan.sampling_defaults or {})
        form = read_answer_format(text.plan.answer_format)
        prompt = self._codec.encode_all(request, claim.endpoint)[0]
        key = (f"comparison {run_number} of {claim.job_id}", text.request_index, plain)
        sequence = self._codec.sequence(key, prompt, request.sampling, 0, self._codec.grammar(request, form))
        sequence.traced_steps = 0
        sequence.group = (sequence.group, plain)
        stream = self._codec.stream(request.sampling, prompt, claim.endpoint, form)
        return _Variant(sequence, OutputStream(key, stream))

    def _step(self) -> None:
        only = self._plain_batch() if self._plain_next else {pair.drafted.key for pair in self._pairs}
        results, given_up = self._engine.step(only, plain=self._plain_next)
        variants = {variant.sequence.number: variant for variant in self._variants.values()}
        for result in results:
            try:
                variants[result.number].take(result)
            except Exception:
                log.exception("A request can't be compared", extra={"action": "compare"})
                given_up.append(variants[result.number].sequence)
        for sequence in given_up:
            self._give_up(sequence.key)
        self._engine.cancel({key for key, variant in self._variants.items() if variant.finished})
        if len(results) and not self._plain_next:
            self._drafted_batch = len(results)
        self._plain_next = self._next_is_plain() if len(results) else not self._plain_next

    def _plain_batch(self) -> set[Hashable]:
        """Return the sequences of the next plain step: those with most tokens left, so that batches stay large."""
        unfinished = [pair for pair in self._pairs if not pair.plain.finished]
        waiting = [pair.plain.sequence.slot < 0 for pair in unfinished]
        order = sorted(zip(waiting, unfinished, strict=True), key=lambda entry: (entry[0], -entry[1].tokens_left))
        return {pair.plain.key for _, pair in order[: self._drafted_batch]}

    def _next_is_plain(self) -> bool:
        """Return whether the next step is plain: that variant has fewer tokens, or the other is finished."""
        drafted, plain = [pair.drafted for pair in self._pairs], [pair.plain for pair in self._pairs]
        if all(variant.finished for variant in drafted) or all(variant.finished for variant in plain):
            return not all(variant.finished for variant in plain)
        return sum(len(variant.ids) for variant in plain) < sum(len(variant.ids) for variant in drafted)

    def _plain_token_ms(self) -> dict[int, float]:
        """Return the plain time per token and sequence in ms, by batch size."""
        times: defaultdict[int, list[float]] = defaultdict(list)
        for pair in self._pairs:
            for step in pair.plain.steps:
                times[step.batch_sequences].append(step.ms)
        return {size: fmean(ms) for size, ms in times.items()}

    def _give_up(self, key: Hashable) -> None:
        """Remove a request that the engine can't decode."""
        for pair in [p for p in self._pairs if key in (p.drafted.key, p.plain.key)]:
            self._engine.cancel({pair.drafted.key, pair.plain.key})
            self._pairs.remove(pair)

    def _renew(self, claim: SpeedupCheckClaim) -> None:
        if time.monotonic() - self._renewed_at < self._lease_s / _RENEWALS_PER_LEASE:
            return
        with self._database.write() as session:
            speedup_checks.renew_check(session, claim.job_id, self._lease_s)
        self._renewed_at = time.monotonic()

    def _store(self, claim: SpeedupCheckClaim) -> None:
        token_ms = self._plain_token_ms()
        rows = [pair.row(token_ms) for pair in self._pairs]
        with self._database.write() as session:
            speedup_checks.save_check(session, self._worker_id, claim.job_id, rows)
        for row in rows:
            if not row.same_text:
                log.error(
                    "Request %d of job %s got a different text when it was decoded again",
                    row.request_index,
                    claim.job_id,
                    extra=_log_extra(claim.job_id) | {"request_index": row.request_index},
                )
        log.info(
            "Decoded %d requests of job %s with and without drafts",
            len(rows),
            claim.job_id,
            extra=_log_extra(claim.job_id),
        )
        self._reset()

    def _reset(self) -> None:
        self._claim = None
        self._pairs, self._variants = [], {}
        self._unread_texts.clear()


def _log_extra(job_id: str) -> dict[str, Any]:
    return {"action": "compare", "job_id": job_id}
