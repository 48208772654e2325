"""The pilot of a job: a sample of its requests that runs first. Then the job pauses, and the others wait.

The pilot's answers are the job's own: after `storage.pausing.resume_job` only the other requests run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Final

from sqlalchemy import ColumnElement, Text, Update, and_, bindparam, cast, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session, aliased

from storage.dialect import database_now, has_open_requests, has_queued_requests
from storage.models import ChoiceOutput, JobRow, PackedSteps, PilotRow, Request, Worker
from storage.statuses import OPEN_REQUEST_STATUSES
from storage.steps.columns import MS_UNITS
from storage.steps.packing import unpack, unpack_optional

BY_PILOT: Final = "pilot"  # the reason of a pause after a pilot
_ROWS_AT_ONCE: Final = 1_000
MIN_REQUESTS, MAX_REQUESTS, MIN_SHARE, MAX_SHARE = 16, 300, 0.01, 0.25  # of a pilot whose size is not given


@dataclass(frozen=True, slots=True)
class PilotOutput:
    """A text of the pilot."""

    request_index: int
    size: int  # characters of the stored request
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    first_of_prompt: bool
    repeats: bool  # its prompt is that of an earlier request of the pilot


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request that has not run."""

    size: int
    texts: int
    max_tokens: int | None
    repeats: bool  # its prompt is that of a request of the pilot, or of one that waits before it


@dataclass(frozen=True, slots=True)
class PilotStep:
    """A step of a worker in which the pilot took part."""

    worker_id: str
    ended_ms: int  # Unix milliseconds
    step_ms: float
    batch_sequences: int
    rows: int  # of the pilot's texts in it that had a token before
    emitted_tokens: int  # of these
    tree_nodes: int  # of these
    first_tokens_of: tuple[int, ...]  # requests of which a text had its first token
    with_prefill: bool


@dataclass(frozen=True, slots=True)
class PilotRecord:
    """What the pilot of a job has left in the database."""

    requests: int  # of the pilot
    open: int  # of them, neither completed nor failed
    outputs: Sequence[PilotOutput]
    steps: Sequence[PilotStep]  # by worker and time
    waiting: Sequence[WaitingRequest]  # requests of the job outside the pilot that must be computed
    copied: int  # other requests outside the pilot: they get copies of answers (storage.cached_answers)
    serving: bool  # only the pilot's requests run


def draw_pilot(session: Session, job_id: str, requests: int | None, seed: int) -> int:
    """Draw the pilot of a new job, spread over its queued requests, and let only these run; return their number.

    One request is drawn from each of as many equal parts of the job. `requests` is their number; None: a hundredth of
    the job, but as many as the workers decode at once, so that its steps are those of the job, unless that is more
    than a quarter of it; always within MIN_REQUESTS and MAX_REQUESTS. A job that is not larger than its pilot runs as
    a whole.
    """
    queued = (Request.job_id == job_id, Request.status == "queued")
    indexes = session.scalars(select(Request.request_index).where(*queued).order_by(Request.request_index)).all()
    count = _size(session, job_id, len(indexes)) if requests is None else min(requests, len(indexes))
    draws = random.Random(seed)
    edges = [len(indexes) * part // count for part in range(count + 1)] if count else []
    drawn = [indexes[draws.randrange(low, high)] for low, high in pairwise(edges)]
    if drawn:
        session.execute(insert(PilotRow), [{"job_id": job_id, "request_index": index} for index in drawn])
        session.execute(update(JobRow).where(JobRow.id == job_id).values(pilot_only=True))
    return len(drawn)


def _size(session: Session, job_id: str, requests: int) -> int:
    """Return the size of the pilot of a job by its number of requests."""
    model = select(JobRow.model).where(JobRow.id == job_id).scalar_subquery()
    serving = (Worker.target == model, Worker.stopped_at.is_(None), Worker.lost_at.is_(None))
    loads = [load or {} for load in session.scalars(select(Worker.load).where(*serving))]
    at_once = sum(int(load.get("max_sequences", 0)) - int(load.get("reserved_sequences", 0)) for load in loads)
    wanted = max(round(MIN_SHARE * requests), min(at_once, round(MAX_SHARE * requests)))
    return min(max(wanted, MIN_REQUESTS), MAX_REQUESTS, requests)


def may_run() -> ColumnElement[bool]:
    """Return the condition that a request does not wait for the pilot of its job."""
    holds = select(JobRow.id).where(JobRow.id == Request.job_id, JobRow.pilot_only).exists()
    return or_(~holds, _in_pilot())


def has_claimable() -> ColumnElement[bool]:
    """Return the condition that a job has queued requests that may run."""
    member = and_(PilotRow.job_id == Request.job_id, PilotRow.request_index == Request.request_index)
    queued = and_(Request.job_id == JobRow.id, Request.status == "queued")
    in_pilot = select(Request.job_id).join(PilotRow, member).where(queued).correlate(JobRow).exists()
    return and_(has_queued_requests(), or_(~JobRow.pilot_only, in_pilot))


def pause_after_pilot(session: Session, job_ids: Collection[str]) -> None:
    """Pause those of the jobs whose pilot has ended; the caller has ended requests of them."""
    parameters = {"jobs": sorted(job_ids), "now": database_now(session)}
    session.connection().execute(_pause_after_pilot(), parameters)


@cache
def _pause_after_pilot() -> Update:
    member = and_(PilotRow.job_id == Request.job_id, PilotRow.request_index == Request.request_index)
    running = and_(Request.job_id == JobRow.id, Request.status.in_(OPEN_REQUEST_STATUSES))
    open_in_pilot = select(Request.job_id).join(PilotRow, member).where(running).correlate(JobRow).exists()
    ended = and_(JobRow.status == "in_progress", JobRow.paused_at.is_(None), ~open_in_pilot, has_open_requests())
    return (
        update(JobRow)
        .where(JobRow.id.in_(bindparam("jobs", expanding=True)), JobRow.pilot_only, ended)
        .values(paused_at=bindparam("now"), pause_reason=BY_PILOT)
    )


def read_pilot(session: Session, job_id: str) -> PilotRecord | None:
    """Return what the pilot of a job has measured; None if the job has none."""
    of_pilot = and_(Request.job_id == job_id, _in_pilot())
    statuses = session.scalars(select(Request.status).where(of_pilot)).all()
    if not statuses:
        return None
    prompts = _Prompts()
    outputs = _outputs(session, job_id, prompts)
    waiting, copied = _waiting(session, job_id, prompts)
    return PilotRecord(
        requests=len(statuses),
        open=sum(status in OPEN_REQUEST_STATUSES for status in statuses),
        outputs=outputs,
        steps=_steps(session, job_id),
        waiting=waiting,
        copied=copied,
        serving=bool(session.scalar(select(JobRow.pilot_only).where(JobRow.id == job_id))),
    )


def _in_pilot() -> ColumnElement[bool]:
    same = (PilotRow.job_id == Request.job_id, PilotRow.request_index == Request.request_index)
    return select(PilotRow.job_id).where(*same).exists()


_SIZE: Final = func.length(cast(Request.body, Text))


_PROMPT: Final = tuple(cast(Request.body[name], Text) for name in ("messages", "prompt", "prompts"))


class _Prompts:
    """The prompts of a job that have been read, as hashes."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # hash -> request that was read first

    def repeats(self, request_index: int, prompt: Sequence[str | None]) -> bool:
        """Return whether an earlier request has this prompt; else remember it."""
        return self._first.setdefault(hash(tuple(prompt)), request_index) != request_index


def _outputs(session: Session, job_id: str, prompts: _Prompts) -> list[PilotOutput]:
    of_request = and_(ChoiceOutput.job_id == Request.job_id, ChoiceOutput.request_index == Request.request_index)
    columns = (ChoiceOutput.prompt_tokens, ChoiceOutput.completion_tokens, ChoiceOutput.finish_reason)
    query = select(Request.request_index, _SIZE, *columns, ChoiceOutput.first_of_prompt, *_PROMPT)
    found = query.join(ChoiceOutput, of_request).where(
        Request.job_id == job_id, _in_pilot(), Request.status == "completed"
    )
    order = (ChoiceOutput.request_index, ChoiceOutput.choice_index)
    texts = []
    for row in session.execute(found.order_by(*order)):
        values: list[Any] = list(row)
        prompt = [values.pop() for _ in _PROMPT][::-1]
        values.append(prompts.repeats(row.request_index, prompt))
        texts.append(PilotOutput(*values))
    return texts


def _waiting(session: Session, job_id: str, prompts: _Prompts) -> tuple[list[WaitingRequest], int]:
    """Return the requests outside the pilot that must be computed, and the number of the others."""
    sampling = Request.body["sampling"]
    limit, n = sampling["max_tokens"].as_integer(), sampling["n"].as_integer()
    rest = and_(Request.job_id == job_id, Request.body.is_not(None), ~_in_pilot(), Request.status != "failed")
    columns = (_SIZE, n, limit, Request.identity, _is_answered().label("answered"), *_PROMPT)
    query = select(Request.request_index, *columns).where(rest).order_by(Request.request_index)
    waiting: list[WaitingRequest] = []
    computed: set[str] = set()
    copied = 0
    for index, size, n, limit, identity, answered, *prompt in session.execute(
        query.execution_options(yield_per=_ROWS_AT_ONCE)
    ):
        if answered or identity in computed:
            copied += 1
            continue
        texts = (n or 1) * _number_of(prompt[-1])
        waiting.append(WaitingRequest(size, texts, limit, prompts.repeats(index, prompt)))
        if identity is not None:
            computed.add(identity)
    return waiting, copied


def _is_answered() -> ColumnElement[bool]:
    """Return the condition that a request outside the pilot has a copy of an answer, or that there is one to copy."""
    other, job = aliased(Request), aliased(JobRow)
    itself = and_(other.job_id == Request.job_id, other.request_index == Request.request_index)
    same = and_(other.identity == Request.identity, other.status == "completed", ~itself)
    source = exists().where(same, job.id == other.job_id, job.erased_at.is_(None))
    its_own = and_(ChoiceOutput.job_id == Request.job_id, ChoiceOutput.request_index == Request.request_index)
    return or_(exists().where(its_own, ChoiceOutput.cached_from.is_not(None)), source)


def _number_of(prompts: str | None) -> int:
    """Return the number of prompts of a request, from its field `prompts` as JSON."""
    return len(json.loads(prompts) or [None]) if prompts else 1


def _steps(session: Session, job_id: str) -> list[PilotStep]:
    in_pilot = select(PilotRow.request_index).where(PilotRow.job_id == job_id)
    query = select(*_STEP_COLUMNS).where(PackedSteps.job_id == job_id, PackedSteps.request_index.in_(in_pilot))
    parts: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for row in session.execute(query):
        columns = zip(*(_column(row, name) for name in _UNPACKED), _plain(row), strict=True)
        for step, (ended, *values) in enumerate(columns, start=row.first_step):
            parts.setdefault((row.worker_id, ended), []).append((row.request_index, step, *values))
    return [_joined(worker_id, ended, rows) for (worker_id, ended), rows in sorted(parts.items())]


_UNPACKED: Final = ("ended_ms", "step_ms", "batch_sequences", "emitted_tokens", "tree_nodes")
_STEP_COLUMNS: Final = (
    *(PackedSteps.request_index, PackedSteps.first_step, PackedSteps.steps, PackedSteps.worker_id),
    *(getattr(PackedSteps, f"min_{name}") for name in (*_UNPACKED, "plain_step_ms")),
    *(getattr(PackedSteps, name) for name in (*_UNPACKED, "plain_step_ms")),
)


def _column(row: Any, name: str) -> list[int]:
    return unpack(getattr(row, f"min_{name}"), getattr(row, name), row.steps)


def _plain(row: Any) -> list[int]:
    """Return for each step whether it shared a prefill."""
    return [int(ms is None) for ms in unpack_optional(row.min_plain_step_ms, row.plain_step_ms, row.steps)]


def _joined(worker_id: str, ended_ms: int, rows: Sequence[tuple[int, ...]]) -> PilotStep:
    """Return a step from its rows: request, step of the text, ms, batch, emitted tokens, nodes, with prefill."""
    later = [row for row in rows if row[1] > 0]
    return PilotStep(
        worker_id=worker_id,
        ended_ms=ended_ms,
        step_ms=min(row[2] for row in rows) / MS_UNITS,
        batch_sequences=max(row[3] for row in rows),
        rows=len(later),
        emitted_tokens=sum(row[4] for row in later),
        tree_nodes=sum(row[5] for row in later),
        first_tokens_of=tuple(row[0] for row in rows if row[1] == 0),
        with_prefill=any(row[6] for row in rows),
    )
