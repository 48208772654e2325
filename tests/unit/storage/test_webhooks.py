"""The outbox of webhooks: every end of a job queues its events with it, and one sender at a time has a delivery."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import delete, text

from storage import batches, keys, webhooks, writes
from storage.batches import BatchEnd
from storage.models import WebhookEndpoint
from storage.records import NewKey, RequestFailure
from storage.session import Database
from storage.webhooks import EVENT_TYPES, Attempt, ClaimedDelivery, DeliveryView, NewEndpoint
from tests.factories import a_job, a_request
from tests.unit.storage.acts import cancel, claim, claim_one, expire, flush, record, whole

TOOK = Attempt(200, None, delivered=True)
FAILED = Attempt(500, "Oops", delivered=False)
REJECTED = a_request(body=None, failure=RequestFailure("invalid_value", "No.", status_code=400))


def endpoint(database: Database, endpoint_id: str = "wh_1", **fields: Any) -> None:
    new = NewEndpoint(endpoint_id, "", "", "https://example.com/hook", EVENT_TYPES, "whsec_c2VjcmV0")
    with database.write() as session:
        webhooks.add_endpoint(session, replace(new, **fields))


def queued(database: Database, **wanted: Any) -> list[DeliveryView]:
    with database.read() as session:
        return list(webhooks.deliveries(session, 100, **wanted).deliveries)


def events(database: Database) -> list[tuple[str, str, str]]:
    return sorted((one.endpoint_id, one.job_id, one.event_type) for one in queued(database))


def claimed(database: Database, limit: int = 8, lease_s: float = 60.0, **kept: Any) -> list[ClaimedDelivery]:
    with database.write() as session:
        return webhooks.claim_deliveries(session, limit, lease_s, **kept)


def recorded(database: Database, one: DeliveryView, attempt: Attempt, retry_in_s: float = 0.0) -> str | None:
    with database.write() as session:
        return webhooks.record_attempt(session, one, attempt, retry_in_s, 3600.0)


def a_batch(database: Database, job_id: str) -> batches.BatchClaim:
    record(database, job_id, 0, input_file_id="file-1", completion_window="24h")
    with database.write() as session:
        found = batches.claim_batch(session, 30.0)
    assert found is not None
    assert found.job_id == job_id
    return found


def test_every_way_in_which_a_job_ends_queues_its_event_in_the_same_transaction(database: Database) -> None:
    endpoint(database)
    record(database, "done")
    flush(database, "w1", whole(claim_one(database).lease, 1))
    record(database, "stopped")
    cancel(database, "stopped")
    record(database, "late", window_s=-1.0)
    expire(database)
    record(database, "refused", [REJECTED])
    with database.write() as session:
        batches.fail_batch(session, a_batch(database, "unread"), [{"code": "x"}], "tiny", 30.0)
    read = a_batch(database, "read")
    with database.write() as session:
        batches.start_batch(session, read, "tiny", 0, 0, 30.0)
    with database.write() as session:
        found = batches.claim_batch(session, 30.0)
        assert found is not None
        batches.end_batch(session, found, BatchEnd(None, None, {}), 30.0)
    ends = {"done": "completed", "stopped": "cancelled", "late": "expired", "refused": "completed"}
    ends |= {"unread": "failed", "read": "completed"}
    assert events(database) == sorted(("wh_1", job_id, f"batch.{status}") for job_id, status in ends.items())

    with pytest.raises(ZeroDivisionError), database.write() as session:  # noqa: PT012
        writes.insert_job(session, a_job("undone"), [REJECTED])
        raise ZeroDivisionError
    assert len(events(database)) == 6, "an end that is rolled back has no event"


def test_an_endpoint_receives_the_events_of_its_key_its_job_and_its_types(database: Database) -> None:
    for job_id, key in (("mine", ""), ("other", ""), ("theirs", "key_2")):
        record(database, job_id, api_key_id=key)
    endpoint(database, "all")
    endpoint(database, "failures", event_types=("batch.failed",))
    endpoint(database, "of the job", job_id="mine")
    endpoint(database, "of the key", api_key_id="key_2")
    endpoint(database, "of everybody", all_keys=True)
    for job_id in ("mine", "other", "theirs"):
        cancel(database, job_id)
    cancel(database, "mine")  # ends once
    found: dict[str, list[str]] = {}
    for endpoint_id, job_id, _ in events(database):
        found.setdefault(endpoint_id, []).append(job_id)
    assert found == {
        "all": ["mine", "other"],
        "of the job": ["mine"],
        "of the key": ["theirs"],
        "of everybody": ["mine", "other", "theirs"],
    }
    assert [one.job_id for one in queued(database, owner="key_2")] == ["theirs"]


def test_background_responses_have_events_of_their_own_and_calls_with_a_waiting_caller_none(database: Database) -> None:
    endpoint(database)
    body = {"v": 1, "model": "tiny", "prompt": "Hello", "response": {"background": True}}
    record(database, "resp_1", [a_request(body=body)])
    record(database, "resp_2", [a_request(body=body)])
    record(database, "resp_3", [a_request(body=body | {"response": {"background": False}})])
    record(database, "chatcmpl-4", [a_request()])
    for found in claim(database, limit=4):
        progress = whole(found.lease, 1)
        (choice,) = progress.finished
        reason = "length" if found.lease.job_id == "resp_2" else "stop"
        flush(database, "w1", replace(progress, finished=(replace(choice, finish_reason=reason),)))
    assert events(database) == [("wh_1", "resp_1", "response.completed"), ("wh_1", "resp_2", "response.incomplete")]


def test_a_delivery_has_one_sender_until_its_claim_ends(database: Database) -> None:
    endpoint(database)
    record(database)
    cancel(database)
    (first,) = claimed(database, lease_s=-1.0)  # it dies
    (second,) = claimed(database)
    assert (second.delivery.id, second.delivery.attempts) == (first.delivery.id, 2)
    assert claimed(database) == []
    assert recorded(database, first.delivery, FAILED) is None, "it has lost its claim"
    assert recorded(database, second.delivery, TOOK) == "delivered"
    assert (claimed(database), queued(database)[0].status) == ([], "delivered")


def test_a_failed_delivery_is_due_again_and_dead_in_the_end_and_can_be_sent_again(database: Database) -> None:
    endpoint(database)
    record(database)
    cancel(database)
    (one,) = claimed(database)
    assert recorded(database, one.delivery, FAILED, retry_in_s=-0.001) == "pending"
    (again,) = claimed(database)
    assert recorded(database, again.delivery, FAILED, retry_in_s=3601.0) == "dead"
    (dead,) = queued(database, status="dead")
    assert (dead.attempts, dead.last_status_code, dead.last_error) == (2, 500, "Oops")
    assert claimed(database) == []
    with database.write() as session:
        webhooks.redeliver(session, dead.id)
    (third,) = claimed(database)
    assert third.delivery.id == dead.id, "the receiver recognises the event"
    gone = Attempt(410, None, delivered=False, final=True)
    assert recorded(database, third.delivery, gone) == "dead"
    with database.write() as session:
        assert webhooks.prune_deliveries(session, 3600.0, 10) == 0
        session.execute(text("UPDATE webhook_deliveries SET ended_at = ended_at - 7200"))
        assert webhooks.prune_deliveries(session, 3600.0, 10) == 1


def test_an_endpoint_with_many_events_leaves_places_to_others(database: Database) -> None:
    for name in ("a", "b"):
        endpoint(database, name)
    for number in range(5):
        record(database, f"job-{number}")
        cancel(database, f"job-{number}")
    taken = claimed(database, limit=8, per_endpoint=2)
    assert sorted(one.endpoint.id for one in taken) == ["a", "a", "b", "b"]
    assert {one.endpoint.id for one in claimed(database, busy={"a"})} == {"b"}


def test_an_event_whose_endpoint_was_removed_meanwhile_fails_no_worker_and_vanishes(database: Database) -> None:
    endpoint(database)
    record(database)
    cancel(database)
    with database.write() as session:
        session.execute(delete(WebhookEndpoint))
    assert claimed(database) == []
    with database.read() as session:
        assert session.scalar(text("SELECT count(*) FROM webhook_deliveries")) == 0


def test_removing_an_endpoint_or_revoking_its_key_ends_its_deliveries(database: Database) -> None:
    key = NewKey("key_1", "somebody", "hash", ("submit",))
    with database.write() as session:
        keys.add_key(session, key)
    endpoint(database, "mine", api_key_id=key.id)
    endpoint(database, "open")
    record(database, "one", api_key_id=key.id)
    cancel(database, "one")
    with database.write() as session:
        assert not webhooks.remove_endpoint(session, "mine", owner="another")
        keys.revoke_key(session, key.id)
        assert webhooks.endpoint(session, "mine") is None
        assert webhooks.endpoint(session, "open") is not None
    assert claimed(database) == []
