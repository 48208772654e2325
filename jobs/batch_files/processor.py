"""Process batch files: read input files into requests, and write results into output and error files.

The processor polls SQL for work and holds a batch under a lease. When it dies, another processor starts the batch over
once the lease has lapsed. Both tasks are idempotent: run twice, they write the same rows and bytes.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, cast

from jobs.batch_files.output_lines import result_line
from jobs.messages import RESPONSES_ENDPOINT, Endpoint, PartialEvent
from jobs.producer import Notify
from jobs.settings import JobsSettings
from jobs.streaming.events import job_events
from jobs.submission.batch_file_validator import BatchLimits, LineReader, ValidationResult, validate_lines
from jobs.submission.input_lines import Line, split_lines
from jobs.submission.models import known_models
from jobs.submission.parameters.identity import cache_default
from jobs.submission.request_parser import Rules, parse_item, refused_request
from jobs.submission.responses_api.stored_history import StoredHistory
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
_HOUSEKEEPING_S: Final = 5.0
_RETRY_S: Final = 2.0
_MAX_READS: Final = 10  # after that many attempts without a result, assume that the file crashes its processors
_CHUNK_REQUESTS: Final = 1_000  # per transaction
_CHUNK_BYTES: Final = 4 << 20
_OUTPUTS_PER_PAGE: Final = 100
_DAY_S: Final = 86_400.0

Publish = Callable[[Sequence[PartialEvent]], None]


class ProcessorStopped(Exception):
    """The process is stopping: release the batch."""


@dataclass(slots=True)
class BatchFileProcessor:
    """Reads inputs and writes outputs, one batch at a time. One instance may run in several threads."""

    database: Database
    settings: JobsSettings
    notify: Notify
    publish: Publish
    stop: threading.Event = field(default_factory=threading.Event)
    lease_s: float = LEASE_S

    def run_once(self) -> bool:
        """Read the input or write the output of one batch; return False if no batch waits."""
        with self.database.write() as session:
            claim = batches.claim_batch(session, self.lease_s)
        if claim is None:
            return False
        try:
            if claim.is_validated:
                _OutputWriting(self, claim).run()
            else:
                with span("ingest", claim.traceparent, job_id=claim.job_id):
                    _InputReading(self, claim).run()
        except ClaimLost:
            log.warning(
                "Lost the lease of batch %s to another processor", claim.job_id, extra=_extra(claim, "claim_lost")
            )
        except ProcessorStopped:
            with self.database.write() as session:
                batches.release(session, claim)
        return True

    def run_housekeeping(self) -> None:
        """End overdue jobs, which must work without live workers too, and delete the content of expired files."""
        with self.database.write() as session:
            ended = writes.end_jobs(session)
            cleared = files.clear_files(session)
        self.publish(job_events(ended.jobs))
        if cleared:
            log.info("Deleted the content of %d files", cleared, extra={"action": "files_cleared"})

    def run(self) -> None:
        """Process batches and do the housekeeping until `stop` is set."""
        housekeeping_at = float("-inf")
        while not self.stop.is_set():
            try:
                if time.monotonic() - housekeeping_at > _HOUSEKEEPING_S:
                    self.run_housekeeping()
                    housekeeping_at = time.monotonic()
                if not self.run_once():
                    self.stop.wait(_POLL_S)
            except DATABASE_UNAVAILABLE as error:
                reason = unavailable_reason(error)
                log.warning("Waiting for the database: %s", reason, extra={"action": "database_away"})
                self.stop.wait(_RETRY_S)
            except Exception:  # continue with the other batches; this one is claimed again when its lease lapses
                log.exception("Processing a batch file failed", extra={"action": "clerk_failed"})
                self.stop.wait(_RETRY_S)


class _Task:
    """Work on one claimed batch, whose lease is renewed meanwhile."""

    def __init__(self, processor: BatchFileProcessor, claim: BatchClaim) -> None:
        self.processor = processor
        self.claim = claim
        self.database = processor.database
        self.settings = processor.settings
        self._renewed_at = time.monotonic()

    def renew_if_due(self) -> None:
        """Renew the lease every _RENEW_S; raise ClaimLost if another processor has it, ProcessorStopped at shutdown."""
        if self.processor.stop.is_set():
            raise ProcessorStopped
        if time.monotonic() - self._renewed_at > _RENEW_S:
            with self.database.write() as session:
                batches.renew_claim(session, self.claim, self.processor.lease_s)
            self._renewed_at = time.monotonic()


class _InputReading(_Task):
    """Turns the input file into requests, or refuses the batch with its errors."""

    def run(self) -> None:
        """Validate the whole file, write its requests, then open the batch: until then its requests don't run."""
        models = known_models(self.database, self.settings)
        limits = BatchLimits(self.settings.max_requests, self.settings.max_line_bytes)
        result = ValidationResult()
        if self.claim.number > _MAX_READS:
            result.add("server_error", "The file could not be read: each attempt ended without a result.")
        else:
            result = validate_lines(self._lines(), self.claim.endpoint, models, limits)
        if result.errors:
            self._refuse(result)
            return
        rules = Rules(
            job_id=self.claim.job_id,
            model=result.model,
            endpoint=cast(Endpoint, self.claim.endpoint),  # validated when the batch was created
            defaults={},
            max_prompt_chars=self.settings.max_prompt_chars,
            context_tokens=models.context_tokens(result.model),
            models=models,
            history=StoredHistory(self.database, self.claim.api_key_id or None),
            owner=self.claim.api_key_id or "",
            cache=cache_default(self.database, self.settings, self.claim.api_key_id),
        )
        reader = LineReader(rules.endpoint, models, limits.line_bytes, result.model)
        tokens = self._write(rules, reader, result.ids.generated())
        try:
            self._open(result, tokens)
        except QuotaExceeded as beyond:
            result.add("token_limit_exceeded", f"The batch exceeds a limit of its API key: {beyond}.")
            self._refuse(result)

    def _refuse(self, result: ValidationResult) -> None:
        with self.database.write() as session:
            status = batches.fail_batch(session, self.claim, result.errors, result.model, self.processor.lease_s)
        log.info("Batch %s failed: %s", self.claim.job_id, result.errors[0], extra=_extra(self.claim, "refused"))
        self.processor.publish(job_events([(self.claim.job_id, status)]))

    def _write(self, rules: Rules, reader: LineReader, ids: Mapping[int, str]) -> int:
        """Write the requests and return their maximum number of tokens, prompts included."""
        first = tokens = 0
        for chunk in _chunked(self._lines()):
            requests = [_request(line, first + n, rules, reader, ids) for n, line in enumerate(chunk)]
            self.renew_if_due()
            with self.database.write() as session:
                batches.renew_claim(session, self.claim, self.processor.lease_s)
                batches.add_requests(session, self.claim, first, requests)
            first += len(chunk)
            tokens += sum(request.tokens for request in requests)
        return tokens

    def _open(self, result: ValidationResult, tokens: int) -> None:
        with self.database.write() as session:
            status = batches.start_batch(
                session, self.claim, result.model, result.requests, tokens, self.processor.lease_s
            )
        log.info("Batch %s has %d requests", self.claim.job_id, result.requests, extra=_extra(self.claim, "opened"))
        if status == "in_progress":
            self.processor.notify(self.claim.job_id, result.model)

    def _lines(self) -> Iterator[Line]:
        return split_lines(self._chunks(), self.settings.max_line_bytes)

    def _chunks(self) -> Iterator[bytes]:
        index = 0
        while True:
            self.renew_if_due()
            with self.database.read() as session:
                data = files.chunk(session, self.claim.input_file_id, index)
            if data is None:
                return
            yield data
            index += 1


class _OutputWriting(_Task):
    """Writes the ended requests of a batch into its output and error file."""

    def run(self) -> None:
        """Write one line per request. The files become visible in the transaction that ends the batch."""
        output, error = _FileWriter(self, "output"), _FileWriter(self, "error")
        prompt_tokens = completion_tokens = 0
        for view, body in self._outputs():
            if view.status == "completed":
                output.write(result_line(self.claim, view, body))
                prompt_tokens += view.prompt_tokens
                completion_tokens += view.completion_tokens
            else:
                error.write(result_line(self.claim, view))
        for writer in (output, error):
            writer.flush()
        usage = {"input_tokens": prompt_tokens, "output_tokens": completion_tokens}
        self._end([output, error], BatchEnd(output.created_id, error.created_id, usage))

    def _end(self, writers: Iterable[_FileWriter], end: BatchEnd) -> None:
        kept_s = self.claim.output_expires_after_s or self.settings.file_days * _DAY_S
        with self.database.write() as session:
            status = batches.end_batch(session, self.claim, end, self.processor.lease_s)
            for writer in writers:
                files.finish_file(session, writer.file_id, writer.size, kept_s, OUTPUT_PURPOSE)
        log.info("Batch %s is %s", self.claim.job_id, status, extra=_extra(self.claim, "filed"))
        self.processor.publish(job_events([(self.claim.job_id, status)]))

    def _outputs(self) -> Iterator[tuple[OutputView, Mapping[str, Any] | None]]:
        """Yield the ended requests, each with its body if the line repeats parts of it."""
        after = -1
        while True:
            self.renew_if_due()
            with self.database.read() as session:
                page = list(islice(queries.outputs(session, self.claim.job_id, after), _OUTPUTS_PER_PAGE))
                completed = [view.request_index for view in page if view.status == "completed"]
                repeated = completed if self.claim.endpoint == RESPONSES_ENDPOINT else []
                bodies = queries.request_bodies(session, self.claim.job_id, repeated) if repeated else {}
            if not page:
                return
            yield from ((view, bodies.get(view.request_index)) for view in page)
            after = page[-1].request_index


OUTPUT_PURPOSE: Final = "batch_output"  # of the error file too: OpenAI's types have no other value


class _FileWriter:
    """Buffers lines and writes them in chunks. Creates the file with the first chunk: no lines, no file."""

    def __init__(self, task: _Task, kind: str) -> None:
        self._task = task
        self._kind = kind
        # The same id in every attempt: a new attempt overwrites the chunks of one that was interrupted.
        self.file_id = "file-" + hashlib.sha256(f"{kind} of {task.claim.job_id}".encode()).hexdigest()[:32]
        self.size = 0
        self._buffer = bytearray()
        self._chunks = 0

    @property
    def created_id(self) -> str | None:
        """The id of the file; None if it has no lines."""
        return self.file_id if self.size else None

    def write(self, line: bytes) -> None:
        """Append a line to the buffer; write the buffer when it fills a chunk."""
        self._buffer += line
        self.size += len(line)
        if len(self._buffer) >= files.CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffered lines, if the lease still holds."""
        if not self._buffer:
            return
        claim = self._task.claim
        with self._task.database.write() as session:
            batches.renew_claim(session, claim, self._task.processor.lease_s)
            if not self._chunks:
                name = f"{claim.job_id}_{self._kind}.jsonl"
                files.begin_file(session, self.file_id, OUTPUT_PURPOSE, name, claim.api_key_id)
            files.append_chunk(session, self.file_id, self._chunks, bytes(self._buffer))
        self._buffer.clear()
        self._chunks += 1


def _request(line: Line, index: int, rules: Rules, reader: LineReader, ids: Mapping[int, str]) -> NewRequest:
    """Return the request of a line: valid, or with the failure for its error row."""
    item, problem = reader.read(index, line)
    request = parse_item(item, rules) if problem is None else refused_request(problem, item)
    return replace(request, custom_id=ids[index]) if index in ids else request


def _chunked(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Yield the lines in chunks of at most _CHUNK_REQUESTS lines and about _CHUNK_BYTES."""
    chunk: list[Line] = []
    size = 0
    for line in lines:
        chunk.append(line)
        size += len(line.text)
        if len(chunk) >= _CHUNK_REQUESTS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _extra(claim: BatchClaim, action: str) -> dict[str, str]:
    return {"action": action, "job_id": claim.job_id}
