"""The clerk: reads the input files of batches into requests, and writes their answers into files.

Looks into SQL for what is to be done, so nothing has to reach it: a batch whose clerk died is taken up by the next one
when the lease lapses, and from the beginning. Both its tasks give the same rows and bytes when they are done twice.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final, cast

from jobs.batch_files.output_lines import answer_line
from jobs.messages import Endpoint, PartialEvent
from jobs.producer import Ring
from jobs.settings import JobsSettings
from jobs.streaming.events import job_events
from jobs.submission.batch_file_validator import Findings, Limits, LineReader, check_lines
from jobs.submission.input_lines import Line, split_lines
from jobs.submission.intake import known_models
from jobs.submission.request_parser import Rules, parse_item, refused_request
from jobs.tracing import span
from storage import batches, files, queries, writes
from storage.batches import BatchClaim, BatchEnd, ClaimLost
from storage.keys import QuotaExceeded
from storage.queries import OutputView
from storage.records import NewRequest
from storage.session import DATABASE_UNAVAILABLE, Database, unavailable_reason

log = logging.getLogger(__name__)

LEASE_S: Final = 15.0
_RENEW_S: Final = 3.0
_POLL_S: Final = 0.5
_TIDY_S: Final = 5.0
_RETRY_S: Final = 2.0
_MAX_READS: Final = 10  # a file whose reading ended so often without a verdict kills its readers
_PIECE_REQUESTS: Final = 1_000  # written in one transaction
_PIECE_BYTES: Final = 4 << 20
_OUTPUTS_AT_ONCE: Final = 100
_DAY_S: Final = 86_400.0

Publish = Callable[[Sequence[PartialEvent]], None]


class Stopped(Exception):
    """The process ends: what is being done is given back."""


@dataclass(slots=True)
class Clerk:
    """Does one thing after the other, for as long as somebody calls `turn`."""

    database: Database
    settings: JobsSettings
    ring: Ring
    publish: Publish
    stop: threading.Event = field(default_factory=threading.Event)
    lease_s: float = LEASE_S

    def turn(self) -> bool:
        """Read or file one batch, if one waits; return whether one did."""
        with self.database.write() as session:
            claim = batches.claim_batch(session, self.lease_s)
        if claim is None:
            return False
        try:
            if claim.is_validated:
                _Filing(self, claim).run()
            else:
                with span("ingest", claim.traceparent, job_id=claim.job_id):
                    _Reading(self, claim).run()
        except ClaimLost:
            log.warning("Another clerk took batch %s", claim.job_id, extra=_about(claim, "claim_lost"))
        except Stopped:
            with self.database.write() as session:
                batches.release(session, claim)
        return True

    def tidy(self) -> None:
        """What any clerk may do for all: end overdue jobs, also where no worker lives, and take ended files' bytes."""
        with self.database.write() as session:
            ended = writes.end_jobs(session)
            cleared = files.clear_files(session)
        self.publish(job_events(ended.jobs))
        if cleared:
            log.info("Removed the bytes of %d files", cleared, extra={"action": "files_cleared"})

    def work(self) -> None:
        """Take turns until `stop` is set."""
        tidied_at = float("-inf")
        while not self.stop.is_set():
            try:
                if time.monotonic() - tidied_at > _TIDY_S:
                    self.tidy()
                    tidied_at = time.monotonic()
                if not self.turn():
                    self.stop.wait(_POLL_S)
            except DATABASE_UNAVAILABLE as error:
                log.warning(
                    "The clerk waits for the database: %s", unavailable_reason(error), extra={"action": "database_away"}
                )
                self.stop.wait(_RETRY_S)
            except Exception:  # the batch is taken up again when its lease lapses; the others must not wait for it
                log.exception("The clerk failed", extra={"action": "clerk_failed"})
                self.stop.wait(_RETRY_S)


class _Task:
    """One claim, kept alive while the work goes on."""

    def __init__(self, clerk: Clerk, claim: BatchClaim) -> None:
        self.clerk = clerk
        self.claim = claim
        self.database = clerk.database
        self.settings = clerk.settings
        self._renewed_at = time.monotonic()

    def keep(self) -> None:
        """Renew the claim if it is time; raise ClaimLost, or Stopped if the process ends."""
        if self.clerk.stop.is_set():
            raise Stopped
        if time.monotonic() - self._renewed_at > _RENEW_S:
            with self.database.write() as session:
                batches.renew_claim(session, self.claim, self.clerk.lease_s)
            self._renewed_at = time.monotonic()


class _Reading(_Task):
    """From the input file to requests, or to the reasons why not."""

    def run(self) -> None:
        """Look at the whole file first; only then write, and last let it count."""
        known = known_models(self.database, self.settings)
        limits = Limits(self.settings.max_requests, self.settings.max_line_bytes)
        findings = Findings()
        if self.claim.number > _MAX_READS:
            findings.add("server_error", "The file could not be read: each attempt ended without a result.")
        else:
            findings = check_lines(self._lines(), self.claim.endpoint, known, limits)
        if findings.errors:
            self._refuse(findings)
            return
        rules = Rules(
            job_id=self.claim.job_id,
            model=findings.model,
            endpoint=cast(Endpoint, self.claim.endpoint),  # checked when the batch was ordered
            defaults={},
            max_prompt_chars=self.settings.max_prompt_chars,
            context_tokens=known[findings.model],
        )
        reader = LineReader(rules.endpoint, known, limits.line_bytes, findings.model)
        tokens = self._write(rules, reader, findings.ids.others())
        try:
            self._open(findings, tokens)
        except QuotaExceeded as beyond:
            findings.add("token_limit_exceeded", f"The key's limit does not leave room for this batch: {beyond}.")
            self._refuse(findings)

    def _refuse(self, findings: Findings) -> None:
        with self.database.write() as session:
            status = batches.fail_batch(session, self.claim, findings.errors, findings.model, self.clerk.lease_s)
        log.info("Batch %s is refused: %s", self.claim.job_id, findings.errors[0], extra=_about(self.claim, "refused"))
        self.clerk.publish(job_events([(self.claim.job_id, status)]))

    def _write(self, rules: Rules, reader: LineReader, ids: Mapping[int, str]) -> int:
        """Write the requests, and return how many tokens they may come to read and write."""
        first = tokens = 0
        for piece in _pieces(self._lines()):
            requests = [_request(line, first + n, rules, reader, ids) for n, line in enumerate(piece)]
            self.keep()
            with self.database.write() as session:
                batches.renew_claim(session, self.claim, self.clerk.lease_s)
                batches.add_requests(session, self.claim, first, requests)
            first += len(piece)
            tokens += sum(request.tokens for request in requests)
        return tokens

    def _open(self, findings: Findings, tokens: int) -> None:
        with self.database.write() as session:
            status = batches.start_batch(
                session, self.claim, findings.model, findings.requests, tokens, self.clerk.lease_s
            )
        log.info("Batch %s has %d requests", self.claim.job_id, findings.requests, extra=_about(self.claim, "opened"))
        if status == "in_progress":
            self.clerk.ring(self.claim.job_id, findings.model)

    def _lines(self) -> Iterator[Line]:
        return split_lines(self._chunks(), self.settings.max_line_bytes)

    def _chunks(self) -> Iterator[bytes]:
        index = 0
        while True:
            self.keep()
            with self.database.read() as session:
                data = files.chunk(session, self.claim.input_file_id, index)
            if data is None:
                return
            yield data
            index += 1


class _Filing(_Task):
    """From the ended requests of a batch to its output and error file."""

    def run(self) -> None:
        """Write the lines of all requests; the files are seen in the moment in which the batch ends."""
        output, error = _FileWriter(self, "output"), _FileWriter(self, "error")
        prompt_tokens = completion_tokens = 0
        for view in self._outputs():
            if view.status == "completed":
                output.write(answer_line(self.claim, view))
                prompt_tokens += view.prompt_tokens
                completion_tokens += view.completion_tokens
            else:
                error.write(answer_line(self.claim, view))
        for writer in (output, error):
            writer.flush()
        usage = {"input_tokens": prompt_tokens, "output_tokens": completion_tokens}
        self._end([output, error], BatchEnd(output.seen_id, error.seen_id, usage))

    def _end(self, writers: Iterable[_FileWriter], end: BatchEnd) -> None:
        kept_s = self.claim.output_expires_after_s or self.settings.file_days * _DAY_S
        with self.database.write() as session:
            status = batches.end_batch(session, self.claim, end, self.clerk.lease_s)
            for writer in writers:
                files.finish_file(session, writer.file_id, writer.size, kept_s, OUTPUT_PURPOSE)
        log.info("Batch %s is %s", self.claim.job_id, status, extra=_about(self.claim, "filed"))
        self.clerk.publish(job_events([(self.claim.job_id, status)]))

    def _outputs(self) -> Iterator[OutputView]:
        after = -1
        while True:
            self.keep()
            with self.database.read() as session:
                page = list(islice(queries.outputs(session, self.claim.job_id, after), _OUTPUTS_AT_ONCE))
            if not page:
                return
            yield from page
            after = page[-1].request_index


OUTPUT_PURPOSE: Final = "batch_output"  # of output and error file alike: OpenAI's types know no other


class _FileWriter:
    """Collects lines and writes them in chunks; there is no file before there is a line."""

    def __init__(self, task: _Task, kind: str) -> None:
        self._task = task
        self._kind = kind
        # The same at every attempt, so that an attempt that was cut short leaves nothing behind.
        self.file_id = "file-" + hashlib.sha256(f"{kind} of {task.claim.job_id}".encode()).hexdigest()[:32]
        self.size = 0
        self._waiting = bytearray()
        self._chunks = 0

    @property
    def seen_id(self) -> str | None:
        """The id of the file, if there is one."""
        return self.file_id if self.size else None

    def write(self, line: bytes) -> None:
        """Add a line."""
        self._waiting += line
        self.size += len(line)
        if len(self._waiting) >= files.CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits, under the claim."""
        if not self._waiting:
            return
        claim = self._task.claim
        with self._task.database.write() as session:
            batches.renew_claim(session, claim, self._task.clerk.lease_s)
            if not self._chunks:
                name = f"{claim.job_id}_{self._kind}.jsonl"
                files.begin_file(session, self.file_id, OUTPUT_PURPOSE, name, claim.api_key_id)
            files.append_chunk(session, self.file_id, self._chunks, bytes(self._waiting))
        self._waiting.clear()
        self._chunks += 1


def _request(line: Line, index: int, rules: Rules, reader: LineReader, ids: Mapping[int, str]) -> NewRequest:
    """Return the request of a line: valid, or with the failure for its error row."""
    item, problem = reader.read(index, line)
    request = parse_item(item, rules) if problem is None else refused_request(problem, item)
    return replace(request, custom_id=ids[index]) if index in ids else request


def _pieces(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Yield the lines in pieces that are neither many nor large."""
    piece: list[Line] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line.text)
        if len(piece) >= _PIECE_REQUESTS or size >= _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _about(claim: BatchClaim, action: str) -> dict[str, str]:
    return {"action": action, "job_id": claim.job_id}
