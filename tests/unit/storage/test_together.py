"""Many at once: workers that claim and write, users that cancel, time that runs out. Nothing waits for ever."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

from storage.records import Progress
from storage.session import Database
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    expire,
    flush,
    record,
    release,
    requests_of,
    tokens_of,
    view,
    whole,
)

FINAL = ("completed", "cancelled", "expired")


def run_all(*acts: Callable[[], None]) -> list[BaseException]:
    """Run acts on threads, all at once, and return what went wrong."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], None]) -> None:
        start.wait()
        try:
            act()
        except BaseException as exc:  # a thread can't raise into the test; the test looks at the list
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_two_workers_that_finish_the_last_two_requests_at_once_end_the_job_once(database: Database) -> None:
    for number in range(10):
        job_id = f"job-{number}"
        record(database, job_id, 2)
        first, second = (claim(database, worker)[0].lease for worker in ("w1", "w2"))
        ended: list[tuple[str, str]] = []

        failures = run_all(
            lambda lease=first: ended.extend(flush(database, "w1", whole(lease, 1)).ended_jobs),  # type: ignore[misc]
            lambda lease=second: ended.extend(flush(database, "w2", whole(lease, 1)).ended_jobs),  # type: ignore[misc]
        )

        assert (failures, ended) == ([], [(job_id, "completed")])
    check_laws(database)


def test_the_laws_hold_when_all_act_at_once(database: Database) -> None:
    jobs = [f"job-{number}" for number in range(4)]
    for job_id in jobs:
        record(database, job_id, 12)

    def work(worker: str) -> None:
        dice = random.Random(worker)
        while any(view(database, job_id).status not in FINAL for job_id in jobs):
            held = [c.lease for c in claim(database, worker, limit=5)]
            flush(
                database,
                worker,
                *(Progress(lease, (tokens_of(0, 1),)) for lease in held[:2]),
                lease_s=dice.choice([-1, 30]),
            )
            done = [whole(lease, 1, dice.randint(1, 4)) for lease in held[2:]]
            flush(database, worker, *done, held=held)
            release(database, worker, *held)

    def keep_house() -> None:
        while any(view(database, job_id).status not in FINAL for job_id in jobs):
            expire(database)

    failures = run_all(
        lambda: work("w1"),
        lambda: work("w2"),
        lambda: work("w3"),
        keep_house,
        lambda: (cancel(database, "job-3"), None)[1],
    )

    assert failures == []
    check_laws(database)
    for job_id in jobs[:3]:
        assert Counter(row.status for row in requests_of(database, job_id).values()) == {"completed": 12}
    assert view(database, "job-3").status == "cancelled"
