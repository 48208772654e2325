from __future__ import annotations

import json
from typing import Any

import pytest
from celery.exceptions import Reject
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from jobs import ingest as module
from jobs.celery_app import INGEST_TASK
from jobs.ingest import ingest, make_ingest_app
from jobs.messages import PromptBatch
from jobs.producer import batch_job_id
from jobs.settings import JobsSettings
from storage import queries
from storage.models import Request
from storage.queries import JobView, OutputView
from storage.session import Database


def a_message(**changes: Any) -> dict[str, Any]:
    return PromptBatch(id="nightly", requests=("one", "two")).model_dump(mode="json") | changes


def ingested(message: Any, database: Database, settings: JobsSettings) -> str | None:
    return ingest(message, database=database, notify=lambda job_id, model: True, settings=settings)


def job_of(batch_id: str, database: Database) -> JobView:
    with database.read() as session:
        job = queries.job(session, batch_job_id(batch_id))
    assert job is not None
    return job


def answers(batch_id: str, database: Database) -> list[OutputView]:
    with database.read() as session:
        return list(queries.outputs(session, batch_job_id(batch_id), after_index=-1))


def test_a_batch_becomes_a_job_whose_id_the_producer_knows(database: Database, settings: JobsSettings) -> None:
    assert ingested(a_message(parameters={"max_tokens": 3}), database, settings) == batch_job_id("nightly")
    assert job_of("nightly", database).requests_total == 2


def test_the_requests_of_a_batch_are_bound_by_its_schema_or_by_their_own(
    database: Database, settings: JobsSettings
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    own = [{"prompt": "two", "regex": "a+"}, {"prompt": "three", "guided_json": {"contains": {"type": "null"}}}]
    ingested(a_message(parameters={"response_format": form}, requests=["one", *own]), database, settings)
    with database.read() as session:
        query = select(Request.body).where(Request.job_id == batch_job_id("nightly")).order_by(Request.request_index)
        first, second, third = session.scalars(query)
    assert (first["grammar"]["kind"], second["grammar"]["kind"], third) == ("json_schema", "regex", None)
    assert [answer.error_param for answer in answers("nightly", database)] == ["guided_json.contains"]


def test_a_batch_asks_for_a_comparison_with_plain_decoding(database: Database, settings: JobsSettings) -> None:
    ingested(a_message(compare_plain=20), database, settings)
    with database.read() as session:
        comparison = queries.job_stats(session, batch_job_id("nightly")).comparison
    assert comparison is not None
    assert comparison.requests_asked == 20


def test_a_batch_has_a_budget(database: Database, settings: JobsSettings) -> None:
    ingested(a_message(budget={"tokens": 100}), database, settings)
    assert (job_of("nightly", database).budget_tokens, job_of("nightly", database).budget_s) == (100, None)


def test_a_batch_without_compare_plain_omits_the_field_for_older_versions() -> None:
    assert set(a_message()) == {"v", "id", "model", "endpoint", "requests", "parameters", "metadata"}


def test_a_batch_delivered_fifty_times_is_one_job(database: Database, settings: JobsSettings) -> None:
    ids = {ingested(a_message(), database, settings) for _ in range(50)}
    assert ids == {batch_job_id("nightly")}
    with database.read() as session:
        assert len(queries.jobs(session, limit=10, after=None).jobs) == 1


def test_a_batch_pushed_again_with_other_content_leaves_the_first(database: Database, settings: JobsSettings) -> None:
    ingested(a_message(), database, settings)
    ingested(a_message(requests=["one", "two", "three"]), database, settings)
    assert job_of("nightly", database).requests_total == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "gpt-9"}, "Available: tiny"),
        ({"requests": []}, "requests"),
        (
            {"requests": [{"custom_id": "a", "prompt": "x"}, {"custom_id": "a", "prompt": "y"}]},
            "requests[0] and requests[1]",
        ),
        ({"parameters": {"max_tokens": 0}}, "max_tokens"),
        ({"surprise": 1}, "surprise"),
        ({"model": "x\0"}, "U+0000"),
        ({"metadata": {"a": "\0"}}, "metadata"),
        ({"v": 2}, "v"),
    ],
)
def test_a_batch_that_is_refused_as_a_whole_says_why_in_sql(
    database: Database, settings: JobsSettings, changes: dict[str, Any], words: str
) -> None:
    ingested(a_message(**changes), database, settings)
    assert job_of("nightly", database).status == "completed"
    [answer] = answers("nightly", database)
    assert answer.error_message is not None
    assert words in answer.error_message


@pytest.mark.parametrize(
    "bad", ["Nice \ud83d", {"top_p": float("nan")}, {"a\ud83d": 1}, {"prompt": json.loads("[" * 400 + "]" * 400)}]
)
def test_a_request_that_is_no_json_fails_alone_and_keeps_its_id(
    database: Database, settings: JobsSettings, bad: Any
) -> None:
    request = {"custom_id": "bad", "prompt": "x"} | (bad if isinstance(bad, dict) else {"prompt": bad})
    message = a_message(requests=["one", request, {"custom_id": "request-0", "prompt": "y"}])
    assert ingested(message, database, settings) == ingested(message, database, settings)
    job = job_of("nightly", database)
    assert (job.requests_total, job.requests_failed) == (3, 1)
    [failed] = answers("nightly", database)
    assert failed.custom_id == "bad"


@pytest.mark.parametrize("batch_id", ["a\ud83d", "a\0"])
def test_a_batch_whose_id_no_database_can_store_is_dropped(
    database: Database, settings: JobsSettings, caplog: pytest.LogCaptureFixture, batch_id: str
) -> None:
    assert ingested(a_message(id=batch_id), database, settings) is None
    assert "without a valid id" in caplog.text


@pytest.mark.parametrize("message", [None, 7, [], {}, {"id": 7}, {"id": ""}])
def test_a_message_without_an_id_is_dropped_with_a_log_line(
    database: Database, settings: JobsSettings, message: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert ingested(message, database, settings) is None
    assert "without a valid id" in caplog.text


def test_a_batch_waits_on_the_queue_while_the_database_is_away(
    database: Database, settings: JobsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("gone"))

    pauses: list[float] = []
    monkeypatch.setattr(module, "ingest", fail)
    task = make_ingest_app(database, settings, sleep=pauses.append).tasks[INGEST_TASK]
    with pytest.raises(Reject) as rejected:
        task(a_message())
    assert rejected.value.requeue
    assert pauses
