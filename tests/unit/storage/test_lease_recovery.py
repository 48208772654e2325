"""Requests of lost workers are requeued, and a request that crashes its workers is found by bisection."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from storage import leases, queries, writes
from storage.lease_recovery import MAX_LONE_CRASHES, mark_lost, reclaim, running_processes
from storage.records import Claim, RequestProgress
from storage.session import Database
from tests.factories import a_request, a_worker_card
from tests.unit.storage.acts import (
    check_laws,
    claim,
    claim_one,
    flush,
    going_on,
    reclaimed,
    record,
    release,
    requests_of,
    tokens_of,
    view,
)


def indexes(claims: list[Claim]) -> list[int]:
    return [claimed.lease.request_index for claimed in claims]


def clear(database: Database, worker: str, *claims: Claim) -> None:
    flush(database, worker, *(going_on(claimed, 1) for claimed in claims))


def register(database: Database, worker: str, hostname: str) -> None:
    with database.write() as session:
        writes.register_worker(session, a_worker_card(id=worker, hostname=hostname))


def serve_all(database: Database, worker: str) -> int:
    """Let a good worker serve everything that is queued; return how many requests."""
    served = 0
    while claims := claim(database, worker, 32):
        flush(database, worker, *(going_on(c, 2, ends=True) for c in claims))
        served += len(claims)
    return served


def die(database: Database, worker: str) -> None:
    """Let a worker die, observed by the reconciler."""
    reclaimed(database, worker)


def test_requests_of_a_dead_worker_are_requeued_before_their_leases_lapse(database: Database) -> None:
    record(database, requests=2)
    claim(database, "w1", 2)

    found = reclaimed(database, "w1")

    assert found.requeued == (("job-1", "tiny"),)
    rows = requests_of(database).values()
    assert {(row.status, row.lease_owner, row.attempts) for row in rows} == {("queued", None, 1)}
    check_laws(database)


def test_requests_of_a_worker_that_renews_are_left_alone(database: Database) -> None:
    record(database)
    claim(database, "w1")

    assert reclaimed(database).requeued == ()
    assert requests_of(database)[0].lease_owner == "w1"


def test_nothing_lapses_while_the_owners_could_not_renew(database: Database) -> None:
    record(database)
    claim(database, "w1", lease_s=-1)

    assert reclaimed(database, lapsed=False).requeued == ()
    assert reclaimed(database).requeued == (("job-1", "tiny"),)


def test_requests_in_flight_at_a_crash_run_again_in_halves(database: Database) -> None:
    record(database, requests=6)
    clear(database, "w1", *claim(database, "w1", 5))
    die(database, "w1")

    first = claim(database, "w2", 9)
    assert indexes(first) == [0, 1, 2]
    assert claim(database, "w2", 9, holding=[c.lease.key for c in first]) == []  # nothing joins them

    clear(database, "w2", *first)
    held = [c.lease.key for c in first]
    second = claim(database, "w2", 9, holding=held)
    assert indexes(second) == [3, 4]

    clear(database, "w2", *second)
    held += [c.lease.key for c in second]
    assert indexes(claim(database, "w2", 9, holding=held)) == [5]
    check_laws(database)


def test_two_workers_run_one_half_each(database: Database) -> None:
    record(database, requests=4)
    clear(database, "w1", *claim(database, "w1", 4))
    die(database, "w1")

    assert indexes(claim(database, "w2", 9)) == [0, 1]
    assert indexes(claim(database, "w3", 9)) == [2, 3]


def test_a_group_waits_until_its_worker_holds_only_cleared_requests(database: Database) -> None:
    record(database, "dying", 2)
    claim(database, "w1", 2)
    record(database, "fresh")
    held = claim(database, "w2", 1)
    die(database, "w1")
    keys = [c.lease.key for c in held]

    assert claim(database, "w2", 9, holding=keys) == []
    clear(database, "w2", *held)
    assert len(claim(database, "w2", 9, holding=keys)) == 1


def test_only_those_without_a_token_since_their_claim_are_suspects(database: Database) -> None:
    record(database, requests=4)
    old = claim(database, "w1", 2)
    clear(database, "w1", *old)
    claim(database, "w1", 2, holding=[c.lease.key for c in old])
    die(database, "w1")

    groups = {index: row.suspect_group for index, row in requests_of(database).items()}
    assert groups[0] is groups[1] is None
    assert None not in (groups[2], groups[3])
    assert groups[2] != groups[3]


@pytest.mark.parametrize("poison", [0, 3, 6, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 4, 5))])
def test_the_request_that_crashes_its_workers_is_found_and_all_others_complete(database: Database, poison: int) -> None:
    record(database, requests=7)
    deaths = 0
    while view(database).status == "in_progress":
        claims = claim(database, f"w{deaths}", 7)
        if poison in indexes(claims):
            die(database, f"w{deaths}")
            deaths += 1
            assert deaths < 10
            continue
        flush(database, f"w{deaths}", *(going_on(c, 2, ends=True) for c in claims))

    rows = requests_of(database)
    assert [index for index, row in rows.items() if row.status == "failed"] == [poison]
    assert (rows[poison].error_code, rows[poison].error_status_code) == ("poison", 500)
    assert deaths <= 5  # 7, 4, 2, 1, and alone once more
    check_laws(database)


def test_a_poison_request_ends_with_an_event_and_ends_its_job(database: Database) -> None:
    record(database)
    register(database, "w1", "host-1")
    register(database, "w2", "host-2")
    claim_one(database, "w1")
    die(database, "w1")
    claim_one(database, "w2")

    found = reclaimed(database, "w2")

    (failed,) = found.poisoned
    assert "two hosts" in failed.failure.message
    assert (failed.custom_id, failed.seq, failed.failure.code) == ("request-0", 1, "poison")
    assert found.ended_jobs == (("job-1", "completed"),)
    assert view(database).requests_failed == 1
    assert requests_of(database)[0].suspect_group is None


def test_a_request_that_crashes_a_host_that_serves_others_fails(database: Database) -> None:
    record(database)
    claim_one(database, "w1")
    die(database, "w1")
    record(database, "meanwhile")
    (other,) = claim(database, "w2", 9)
    assert other.lease.job_id == "meanwhile"  # another request first: it shows whether the host works
    flush(database, "w2", going_on(other, 2, ends=True))
    assert claim_one(database, "w2").lease.job_id == "job-1"

    (failed,) = reclaimed(database, "w2").poisoned

    assert "twice" in failed.failure.message
    assert "had served other requests" in failed.failure.message
    check_laws(database)


def test_a_request_that_crashes_its_only_worker_again_and_again_fails_in_the_end(
    database: Database,
) -> None:
    record(database)
    deaths = 0
    while view(database).status == "in_progress":
        register(database, f"w{deaths}", "the only host")
        claim_one(database, f"w{deaths}")
        found = reclaimed(database, f"w{deaths}")
        deaths += 1
        assert deaths < 10

    (failed,) = found.poisoned
    assert deaths > MAX_LONE_CRASHES
    assert f"{deaths} times" in failed.failure.message
    assert "the host may be at fault" in failed.failure.message
    check_laws(database)


# Deaths: one less than twice the requests until each is alone, then almost four for each.
@pytest.mark.parametrize(("requests", "deaths"), [(4, 22), pytest.param(8, 45, marks=pytest.mark.long)])
def test_a_worker_that_crashes_at_every_first_step_fails_no_request(
    database: Database, requests: int, deaths: int
) -> None:
    record(database, requests=requests)
    for death in range(deaths):
        register(database, f"bad-{death}", "bad")
        assert claim(database, f"bad-{death}", requests)
        assert reclaimed(database, f"bad-{death}").poisoned == ()

    served = serve_all(database, "good")

    assert served == requests
    assert (view(database).requests_completed, view(database).requests_failed) == (requests, 0)
    check_laws(database)


def test_a_bad_worker_beside_good_ones_of_its_host_fails_no_request(
    database: Database,
) -> None:
    record(database, requests=16)
    register(database, "good", "host")
    deaths = 0
    while view(database).status == "in_progress":
        register(database, f"bad-{deaths}", "host")
        if claim(database, f"bad-{deaths}", 16):
            assert reclaimed(database, f"bad-{deaths}").poisoned == ()
            deaths += 1
        held = claim(database, "good", 2)
        flush(database, "good", *(going_on(c, 2, ends=True) for c in held))
    assert deaths > 5
    assert (view(database).requests_completed, view(database).requests_failed) == (16, 0)
    check_laws(database)


def test_several_poison_requests_on_one_host_are_found(database: Database) -> None:
    record(database, requests=20)
    poison, deaths = {3, 4, 17}, 0
    while view(database).status == "in_progress":
        worker = f"w{deaths}"
        register(database, worker, "the only host")
        held: list[Claim] = []
        while claims := claim(database, worker, 4, holding=[c.lease.key for c in held]):
            if poison.intersection(indexes(claims)):
                die(database, worker)
                deaths += 1
                assert deaths < 40
                break
            flush(database, worker, *(going_on(c, 2, ends=True) for c in claims))

    assert {index for index, row in requests_of(database).items() if row.error_code == "poison"} == poison
    check_laws(database)


def test_a_lease_that_lapses_while_its_worker_lives_never_counts(database: Database) -> None:
    record(database, requests=3)
    for number in range(8):
        assert claim(database, f"w{number}", 3, lease_s=-1)
        assert reclaimed(database).poisoned == ()

    rows = requests_of(database).values()
    assert {(row.status, row.lone_crashes) for row in rows} == {("queued", 0)}
    assert serve_all(database, "patient") == 3


def test_a_request_that_lapsed_before_waits_longer_for_its_owner(database: Database) -> None:
    record(database)
    for number, waits_s in enumerate([0, 10, 30, 70, 150, 150]):
        for late_s in (waits_s - 1, waits_s + 1):
            if late_s < waits_s:
                with database.write() as session:
                    (claimed,) = leases.claim(session, f"w{number}", "tiny", 1, lease_s=-late_s)
            else:
                flush(database, f"w{number}", held=[claimed.lease], lease_s=-late_s)
            with database.write() as session:
                given_back = reclaim(session, patience_s=10.0).requeued
            assert bool(given_back) == (late_s > waits_s)


def test_a_committed_token_resets_the_count_of_crashes(database: Database) -> None:
    record(database)
    for worker in ("w1", "w2", "w3", "w4"):
        claimed = claim_one(database, worker)
        clear(database, worker, claimed)
        die(database, worker)

    assert requests_of(database)[0].status == "queued"
    claim_one(database, "w5")
    die(database, "w5")
    row = requests_of(database)[0]
    assert (row.lone_crashes, row.lone_served, row.lone_host) == (1, False, None)


def test_a_release_is_no_crash(database: Database) -> None:
    record(database)
    for worker in ("w1", "w2", "w3"):
        release(database, worker, claim_one(database, worker).lease)

    row = requests_of(database)[0]
    assert (row.status, row.attempts, row.lone_crashes, row.suspect_group) == ("queued", 0, 0, None)


def test_a_claim_whose_answer_was_lost_is_requeued_without_suspicion(database: Database) -> None:
    record(database, requests=2)
    known = claim_one(database, "w1")
    claim(database, "w1", lease_s=-6, holding=[known.lease.key])  # committed, but the worker never got the result

    assert reclaimed(database).requeued == (("job-1", "tiny"),)

    row = requests_of(database)[1]
    assert (row.status, row.attempts, row.suspect_group) == ("queued", 0, None)


def test_a_worker_that_wakes_up_after_its_lease_writes_nothing(database: Database) -> None:
    record(database)
    stale = claim_one(database, "w1", lease_s=-1)
    reclaimed(database)

    assert flush(database, "w1", going_on(stale, 2)).lost == {stale.lease.key}
    new = claim_one(database, "w2")
    assert new.checkpoints == ()
    assert flush(database, "w1", going_on(stale, 2)).lost == {stale.lease.key}
    check_laws(database)


def test_suspects_of_another_model_delay_no_claim(database: Database) -> None:
    record(database, "large", model="large")
    claim(database, "w1", model="large")
    die(database, "w1")
    record(database, "small")

    assert [c.lease.job_id for c in claim(database, "w2")] == ["small"]


def test_dead_and_silent_workers_are_marked_and_one_that_comes_back_is_not(database: Database) -> None:
    with database.write() as session:
        for worker in ("dead", "silent", "alive", "left"):
            writes.register_worker(session, a_worker_card(id=worker, process=f"boot/pid/{worker}"))
        writes.mark_stopped(session, "left")
        session.execute(text("UPDATE workers SET last_seen_at = last_seen_at - 61 WHERE id = 'silent'"))
    with database.write() as session:
        assert {p.worker_id for p in running_processes(session)} == {"dead", "silent", "alive"}
        mark_lost(session, ["dead"], 60.0)
    with database.read() as session:
        assert {w.id for w in queries.workers(session) if w.lost_at is not None} == {"dead", "silent"}
        assert {p.worker_id for p in running_processes(session)} == {"alive"}

    with database.write() as session:
        writes.record_heartbeat(session, "silent")
    with database.read() as session:
        assert {w.id for w in queries.workers(session) if w.lost_at is not None} == {"dead"}


def test_a_job_with_newer_bodies_is_left_to_newer_workers(database: Database) -> None:
    record(database, "new", body_version=2)
    record(database, "old")

    assert [c.lease.job_id for c in claim(database, limit=9)] == ["old"]
    assert [c.lease.job_id for c in claim(database, limit=9, body_version=2)] == ["new"]


@pytest.mark.parametrize("running", [False, True])
def test_a_request_fails_when_its_own_deadline_is_over(database: Database, running: bool) -> None:
    record(database, requests=[a_request("late", timeout_s=60.0), a_request("patient")])
    held = claim(database, limit=2) if running else []
    if running:
        flush(database, "w1", *(RequestProgress(c.lease, (tokens_of(1, 2),)) for c in held))
    with database.write() as session:
        assert writes.expire_requests(session) == writes.Ended()
        session.execute(text("UPDATE requests SET expires_at = 1.0 WHERE custom_id = 'late'"))
    if running:
        assert flush(database, "w1", held=[c.lease for c in held]).lost == {("job-1", 0)}

    with database.write() as session:
        ended = writes.expire_requests(session)

    (failed,) = ended.failed
    assert (failed.custom_id, failed.seq, failed.failure.code) == ("late", 2 if running else 0, "deadline_exceeded")
    assert ended.jobs == ()
    assert requests_of(database)[0].status == "failed"
    check_laws(database)
