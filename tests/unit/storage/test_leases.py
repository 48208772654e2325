from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict

from sqlalchemy import select, update

from storage import leases
from storage.models import Partial
from storage.records import Claim, Lease, RequestFailure, RequestPlan, RequestProgress
from storage.session import Database
from tests.factories import some_steps
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    claim_one,
    end_of,
    expire,
    flush,
    going_on,
    reclaimed,
    record,
    release,
    requests_of,
    tokens_of,
    view,
)


def to_notify(database: Database, older_than_s: float) -> list[tuple[str, str]]:
    with database.write() as session:
        return leases.jobs_to_notify(session, older_than_s)


def test_a_claim_brings_what_the_worker_needs(database: Database) -> None:
    record(database, requests=2)

    first, second = claim(database, limit=5)

    assert (first.lease, second.lease) == (Lease("job-1", 0, 1), Lease("job-1", 1, 1))
    assert (first.custom_id, first.endpoint, first.attempts) == ("request-0", "/v1/chat/completions", 1)
    assert first.body["prompt"] == "Hello"
    assert (first.checkpoints, first.finished_choices) == ((), ())
    assert first.started_at == view(database).started_at
    assert claim(database, "w2") == []
    check_laws(database)


def test_only_requests_of_the_worker_s_model_are_claimed(database: Database) -> None:
    record(database, "other", model="large")

    assert claim(database) == []
    assert len(claim(database, model="large")) == 1


def test_a_running_request_with_a_live_lease_is_left_alone(database: Database) -> None:
    record(database)
    claim(database, "w1")

    assert claim(database, "w2") == []


def test_a_lapsed_request_goes_to_the_next_claimer_with_a_higher_number(database: Database) -> None:
    record(database)
    old = claim_one(database, "w1", lease_s=-1)

    new = claim_one(database, "w2")

    assert (new.lease.number, new.attempts) == (2, 2)
    assert new.started_at == old.started_at


def test_a_new_owner_gets_checkpoints_and_finished_choices(database: Database) -> None:
    record(database)
    old = claim_one(database, "w1")
    first, second, other = tokens_of(1, 1, 3), tokens_of(2, 2, first=2), tokens_of(1, 1, choice=1)
    flush(
        database,
        "w1",
        RequestProgress(old.lease, (first, other), (end_of(other, choice=1),)),
        RequestProgress(old.lease, (second,)),
        lease_s=-1,
    )

    new = claim_one(database, "w2")

    assert new.checkpoints == (first, second)
    assert new.finished_choices == (1,)


def test_a_new_owner_gets_the_plan_of_the_one_that_began(database: Database) -> None:
    record(database)
    plan = RequestPlan({"reasoning": {"start": "<think>", "end": "</think>"}}, {"top_k": 20})
    old = claim_one(database, "w1")
    assert (old.plan, old.begun) == (RequestPlan(), False)
    flush(database, "w1", RequestProgress(old.lease, (tokens_of(1, 1),), plan=plan))
    flush(database, "w1", RequestProgress(old.lease, (tokens_of(2, 1),)), lease_s=-1)

    new = claim_one(database, "w2")

    assert (new.plan, new.begun) == (plan, True)


def test_an_older_worker_continues_what_a_newer_one_has_begun(database: Database) -> None:
    record(database)
    old = claim_one(database, "newer")
    flush(database, "newer", RequestProgress(old.lease, (tokens_of(1, 1, 3),)), lease_s=-1)
    with database.write() as session:
        steps = session.scalars(select(Partial.step_columns)).one()
        session.execute(update(Partial).values(step_columns={**(steps or {}), "column_of_tomorrow": 1}))

    new = claim_one(database, "older")
    flush(database, "older", going_on(new, 2, ends=True))

    assert new.checkpoints == (tokens_of(1, 1, 3),)
    assert view(database).status == "completed"
    check_laws(database)


def test_the_steps_that_an_old_version_wrote_as_rows_count(database: Database) -> None:
    record(database)
    old = claim_one(database, "old")
    flush(database, "old", RequestProgress(old.lease, (tokens_of(1, 1, 3),)), lease_s=-1)
    rows = [asdict(step) for step in some_steps(1, 3)]
    with database.write() as session:
        session.execute(update(Partial).values(step_columns=None, steps=rows))

    new = claim_one(database, "new")
    flush(database, "new", going_on(new, 2, ends=True))

    assert new.checkpoints == (tokens_of(1, 1, 3),)
    check_laws(database)


def test_lapsed_requests_are_claimed_before_queued_ones(database: Database) -> None:
    record(database, requests=4)
    claim(database, "w1", limit=3, lease_s=-10)
    flush(database, "w1", held=[Lease("job-1", 0, 1)])

    assert [c.lease.request_index for c in claim(database, "w2", limit=3)] == [1, 2, 3]


def test_a_worker_gets_its_own_lapsed_request_only_if_it_does_not_hold_it(database: Database) -> None:
    record(database)
    held = claim_one(database, "w1", lease_s=-1)

    assert claim(database, "w1", holding=[held.lease.key]) == []
    assert [c.lease.number for c in claim(database, "w1")] == [2]


def test_two_jobs_share_the_slots(database: Database) -> None:
    record(database, "large", 100)
    record(database, "small", 3)

    first = Counter(c.lease.job_id for c in claim(database, limit=4))
    second = Counter(c.lease.job_id for c in claim(database, limit=6))

    assert first == {"large": 2, "small": 2}
    assert second == {"large": 5, "small": 1}


def test_a_job_that_comes_late_catches_up(database: Database) -> None:
    record(database, "early", 100)
    claim(database, limit=8)
    record(database, "late", 100)

    assert Counter(c.lease.job_id for c in claim(database, limit=10)) == {"late": 9, "early": 1}


def test_a_huge_job_does_not_starve_a_later_one_where_there_is_one_slot_only(database: Database) -> None:
    record(database, "huge", 200)
    record(database, "small", 1)
    turns = 0
    while "small" not in {c.lease.job_id for c in _serve_one(database)}:
        turns += 1
        assert turns < 60, "lots can't fall like that"


def test_no_job_starves_where_there_are_more_jobs_than_slots(database: Database) -> None:
    for number in range(3):
        record(database, f"job-{number}", 40)
    served = Counter(c.lease.job_id for _ in range(40) for c in _serve_one(database))
    assert len(served) == 3


def _serve_one(database: Database) -> list[Claim]:
    (claimed,) = claim(database)
    flush(database, "w1", RequestProgress(claimed.lease, failure=RequestFailure("invalid_value", "done with")))
    return [claimed]


def test_an_owner_of_many_jobs_gets_no_more_than_one_of_a_single_small_job(database: Database) -> None:
    for number in range(30):
        record(database, f"mass-{number}", 50, api_key_id="mass")
    claim(database, limit=8)
    record(database, "small", 10, api_key_id="small")

    served = [Counter(c.lease.job_id.partition("-")[0] for c in claim(database, limit=limit)) for limit in (8, 4)]

    assert served == [{"small": 8}, {"small": 2, "mass": 2}]


def test_the_jobs_of_one_owner_share_what_it_gets(database: Database) -> None:
    record(database, "large", 100, api_key_id="alice")
    record(database, "other", 100, api_key_id="bob")
    claim(database, limit=12)
    record(database, "small", 100, api_key_id="alice")

    assert Counter(c.lease.job_id for c in claim(database, limit=8)) == {"small": 4, "other": 4}


def test_an_owner_whose_jobs_are_all_running_leaves_the_slots_to_the_others(database: Database) -> None:
    record(database, "short", 3, api_key_id="alice")
    record(database, "long", 100, api_key_id="bob")

    assert Counter(c.lease.job_id for c in claim(database, limit=10)) == {"short": 3, "long": 7}


def test_two_claimers_never_get_the_same_request(database: Database) -> None:
    record(database, "a", 60)
    record(database, "b", 60)
    taken: list[tuple[str, int]] = []
    start = threading.Barrier(4)

    def take_all(worker: str) -> None:
        start.wait()
        while claims := claim(database, worker, limit=5):
            taken.extend(c.lease.key for c in claims)

    threads = [threading.Thread(target=take_all, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(taken) == [(job, index) for job in ("a", "b") for index in range(60)]
    check_laws(database)


def test_a_released_request_is_queued_and_the_attempt_does_not_count(database: Database) -> None:
    record(database)
    old = claim_one(database, "w1")
    flush(database, "w1", RequestProgress(old.lease, (tokens_of(1, 1, 2),)))

    release(database, "w1", old.lease)

    row = requests_of(database)[0]
    assert (row.status, row.attempts, row.lease_owner, row.lease_number) == ("queued", 0, None, 1)
    new = claim_one(database, "w2")
    assert (new.attempts, new.lease.number) == (1, 2)
    assert [c.seq for c in new.checkpoints] == [1]
    check_laws(database)


def test_only_the_owner_can_release(database: Database) -> None:
    record(database)
    old = claim_one(database, "w1", lease_s=-1)
    claim(database, "w2")

    release(database, "w1", old.lease)

    row = requests_of(database)[0]
    assert (row.status, row.lease_owner) == ("running", "w2")


def test_a_request_released_after_a_cancel_ends_the_job(database: Database) -> None:
    record(database)
    held = claim_one(database, "w1")
    assert cancel(database) == "cancelling"

    release(database, "w1", held.lease)

    assert view(database).status == "cancelled"
    assert requests_of(database)[0].status == "cancelled"
    check_laws(database)


def test_nothing_is_claimed_of_a_job_that_is_cancelled_or_has_ended(database: Database) -> None:
    record(database, "cancelled")
    record(database, "over", window_s=-1.0)
    cancel(database, "cancelled")

    assert claim(database, limit=9) == []
    expire(database)
    assert claim(database, limit=9) == []


def test_workers_are_notified_again_while_no_one_claims(database: Database) -> None:
    record(database)

    assert to_notify(database, 10.0) == []  # just notified
    assert to_notify(database, -1.0) == [("job-1", "tiny")]
    assert to_notify(database, 10.0) == [], "and so it has now"


def test_workers_are_not_notified_of_running_requests(database: Database) -> None:
    record(database)
    held = claim_one(database, "w1")
    assert to_notify(database, -1.0) == []

    flush(database, "w1", held=[held.lease], lease_s=-1)  # its worker is dead
    reclaimed(database)
    assert to_notify(database, -1.0) == [("job-1", "tiny")]


def test_interactive_requests_are_claimed_before_older_and_larger_jobs(database: Database) -> None:
    record(database, "batch", requests=5)
    record(database, "chat", priority=1)
    record(database, "other chat", priority=1)

    first = claim(database, limit=3)

    assert {c.lease.job_id for c in first[:2]} == {"chat", "other chat"}
    assert [(c.lease.job_id, c.priority) for c in first[2:]] == [("batch", 0)]


def test_reserved_slots_are_left_free_for_interactive_requests(database: Database) -> None:
    record(database, "batch", requests=5)

    with database.write() as session:
        taken = leases.claim(session, "w1", "tiny", 3, 30.0, reserved=2)
        assert [c.lease.job_id for c in taken] == ["batch"]
        assert leases.claim(session, "w1", "tiny", 2, 30.0, reserved=2) == []
    record(database, "chat", priority=1)
    with database.write() as session:
        assert [c.lease.job_id for c in leases.claim(session, "w1", "tiny", 2, 30.0, reserved=2)] == ["chat"]
