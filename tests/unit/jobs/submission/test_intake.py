from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from jobs.errors import (
    DuplicateCustomId,
    EmptyJob,
    IdempotencyConflict,
    InvalidValue,
    TooManyRequests,
    UnknownModel,
    UnknownParameter,
)
from jobs.settings import JobsSettings
from jobs.submission.intake import Submission, create_job
from jobs.submission.items import Item
from storage import queries, writes
from storage.models import Request
from storage.queries import JobView, OutputView
from storage.session import Database
from tests.factories import a_worker_card


class Intake:
    """Creates jobs, and collects the notifications of workers."""

    def __init__(self, database: Database, settings: JobsSettings) -> None:
        self.database = database
        self.settings = settings
        self.notified: list[tuple[str, str]] = []

    def accept(self, *values: Any, **submission: Any) -> str:
        items = [Item(index, value, index + 1) for index, value in enumerate(values)]
        return create_job(
            Submission(items, **submission),
            database=self.database,
            notify=lambda job_id, model: self.notified.append((job_id, model)),
            settings=self.settings,
        )

    def job(self, job_id: str) -> JobView:
        with self.database.read() as session:
            job = queries.job(session, job_id)
        assert job is not None
        return job

    def names(self, job_id: str) -> list[str]:
        with self.database.read() as session:
            wanted = select(Request.custom_id).where(Request.job_id == job_id).order_by(Request.request_index)
            return list(session.scalars(wanted))

    def failed(self, job_id: str) -> list[OutputView]:
        with self.database.read() as session:
            return [output for output in queries.outputs(session, job_id, after_index=-1) if output.error_message]


@pytest.fixture
def intake(database: Database, settings: JobsSettings) -> Intake:
    return Intake(database, settings)


def test_a_new_job_is_stored_and_its_workers_are_notified(intake: Intake) -> None:
    job_id = intake.accept("one", "two", metadata={"team": "a"})
    job = intake.job(job_id)
    assert (job.status, job.model, job.requests_total, job.metadata) == ("in_progress", "tiny", 2, {"team": "a"})
    assert intake.notified == [(job_id, "tiny")]


def test_an_invalid_request_fails_alone(intake: Intake) -> None:
    job_id = intake.accept("one", {"prompt": "two", "temperature": -1}, "three")
    job = intake.job(job_id)
    assert (job.status, job.requests_total, job.requests_failed) == ("in_progress", 3, 1)
    [failed] = intake.failed(job_id)
    assert failed.error_message is not None
    assert failed.error_message.startswith("line 2, temperature: ")


def test_a_job_of_bad_requests_only_is_completed_at_once(intake: Intake) -> None:
    job = intake.job(intake.accept("", ""))
    assert (job.status, job.requests_failed) == ("completed", 2)


def test_a_repeated_key_returns_the_first_job_and_notifies_once(intake: Intake) -> None:
    first = intake.accept("one", idempotency_key="k", body_sha256="x")
    again = intake.accept("one", idempotency_key="k", body_sha256="x")
    assert first == again
    assert len(intake.notified) == 1


def test_a_repeated_key_with_another_body_is_a_conflict(intake: Intake) -> None:
    intake.accept("one", idempotency_key="k", body_sha256="x")
    with pytest.raises(IdempotencyConflict):
        intake.accept("two", idempotency_key="k", body_sha256="y")


def test_without_a_key_two_submissions_are_two_jobs(intake: Intake) -> None:
    assert intake.accept("one") != intake.accept("one")


def test_a_custom_id_given_twice_is_refused_naming_both_lines(intake: Intake) -> None:
    with pytest.raises(DuplicateCustomId, match="line 1 and line 3"):
        intake.accept({"custom_id": "a", "prompt": "x"}, "y", {"custom_id": "a", "prompt": "z"})


def test_an_id_that_looks_like_ours_stays_with_its_request(intake: Intake) -> None:
    job_id = intake.accept("one", {"custom_id": "request-0", "prompt": "two"}, {"custom_id": 7, "prompt": "x"}, "four")
    assert intake.names(job_id) == ["request-0-unnamed", "request-0", "7", "request-3"]


def test_a_bad_id_never_takes_that_of_another_request(intake: Intake) -> None:
    job_id = intake.accept({"custom_id": 7.5, "prompt": "x"}, {"custom_id": "7.5", "prompt": "y"}, {"custom_id": 7.5})
    assert intake.names(job_id) == ["request-0", "7.5", "request-2"]


@pytest.mark.parametrize("bad", [{"prompt": "x", "model": "gpt-9"}, {"prompt": "x", "model": 7}, 7, ["x"]])
def test_a_bad_first_request_chooses_no_model_for_the_others(intake: Intake, bad: Any) -> None:
    with intake.database.write() as session:
        writes.register_worker(session, a_worker_card(target="other", context_tokens=64))
    job_id = intake.accept(bad, bad, {"prompt": "one", "model": "other"})
    job = intake.job(job_id)
    assert (job.model, job.requests_total, job.requests_failed) == ("other", 3, 2)


def test_a_job_without_requests_is_refused(intake: Intake) -> None:
    with pytest.raises(EmptyJob):
        intake.accept()


def test_more_requests_than_one_job_may_hold_are_refused_with_the_limit(intake: Intake) -> None:
    with pytest.raises(TooManyRequests, match="at most 5 requests"):
        intake.accept(*"abcdef")


@pytest.mark.parametrize("model", ["../../etc", "/etc/passwd", "https://evil", "gpt-9"])
def test_an_unknown_model_is_refused_naming_those_there_are(intake: Intake, model: str) -> None:
    with pytest.raises(UnknownModel, match="Available: tiny"):
        intake.accept("one", model=model)


def test_the_first_request_may_name_the_model(intake: Intake) -> None:
    with pytest.raises(UnknownModel):
        intake.accept({"prompt": "one", "model": "other"})
    with intake.database.write() as session:
        writes.register_worker(session, a_worker_card(target="other", context_tokens=64))
    assert intake.job(intake.accept({"prompt": "one", "model": "other"})).model == "other"


def test_a_cap_beyond_the_context_of_the_worker_is_accepted_on_a_line_and_for_the_job(intake: Intake) -> None:
    with intake.database.write() as session:
        writes.register_worker(session, a_worker_card(target="tiny", context_tokens=64))
    assert intake.failed(intake.accept({"prompt": "one", "max_tokens": 65}, "two")) == []
    assert intake.failed(intake.accept("one", parameters={"max_tokens": 1_000_000})) == []


@pytest.mark.parametrize(
    ("line", "endpoint"),
    [
        ({"body": {"prompt": "one"}}, "/v1/completions"),
        ({"body": {"messages": [{"role": "user", "content": "one"}]}}, "/v1/chat/completions"),
        ({"url": "/v1/completions", "body": {"prompt": "one"}}, "/v1/completions"),
        ({"prompt": "one"}, "/v1/chat/completions"),
        ("one", "/v1/chat/completions"),
    ],
)
def test_a_job_without_an_endpoint_has_that_of_its_first_line(intake: Intake, line: Any, endpoint: str) -> None:
    job_id = intake.accept(line, endpoint=None)
    assert (intake.job(job_id).endpoint, intake.failed(job_id)) == (endpoint, [])


def test_a_bad_parameter_of_the_job_refuses_the_job(intake: Intake) -> None:
    with pytest.raises(InvalidValue, match="max_tokens: must be greater than or equal to 1, not 0"):
        intake.accept("one", parameters={"max_tokens": 0})
    with pytest.raises(UnknownParameter, match="did you mean max_tokens"):
        intake.accept("one", parameters={"max_token": 5})


@pytest.mark.parametrize(
    "metadata", ["text", {"a": 1}, {"a" * 65: "x"}, {"a": "x" * 513}, {str(n): "x" for n in range(17)}, {"a": "\0"}]
)
def test_metadata_beyond_its_limits_refuses_the_job(intake: Intake, metadata: Any) -> None:
    with pytest.raises(InvalidValue, match="metadata"):
        intake.accept("one", metadata=metadata)
