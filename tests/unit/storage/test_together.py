"""Concurrency: workers claim and write, users cancel, windows end, all at once. Nothing deadlocks."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable

from storage.records import Lease
from storage.session import Database
from tests.unit.storage.acts import (
    cancel,
    check_laws,
    claim,
    expire,
    flush,
    going_on,
    record,
    release,
    requests_of,
    view,
    whole,
)

FINAL = ("completed", "cancelled", "expired")


def run_all(*acts: Callable[[], None]) -> list[BaseException]:
    """Run acts on threads at once and return their exceptions."""
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
    for number in range(5):
        job_id = f"job-{number}"
        record(database, job_id, 2)
        leases = {worker: claim(database, worker)[0].lease for worker in ("w1", "w2")}
        ended: list[tuple[str, str]] = []

        def finish(worker: str, leases: dict[str, Lease] = leases, ended: list[tuple[str, str]] = ended) -> None:
            ended += flush(database, worker, whole(leases[worker], 1)).ended_jobs

        assert run_all(lambda: finish("w1"), lambda: finish("w2")) == []
        assert ended == [(job_id, "completed")]
    check_laws(database)


def test_the_laws_hold_when_all_act_at_once(database: Database) -> None:
    """Workers write tokens, then finish, release or drop their requests, while one job is cancelled."""
    jobs = [f"job-{number}" for number in range(4)]
    for job_id in jobs:
        record(database, job_id, 6)

    def unfinished() -> bool:
        return any(view(database, job_id).status not in FINAL for job_id in jobs)

    def work(worker: str) -> None:
        dice = random.Random(worker)
        while unfinished():
            for claimed in claim(database, worker, limit=5):
                act = dice.choice(["finish", "finish", "release", "forget"])
                progress = going_on(claimed, dice.randint(1, 4), ends=act == "finish")
                flush(database, worker, progress, lease_s=-1.0 if act == "forget" else 30.0)
                if act == "release":
                    release(database, worker, claimed.lease)

    def keep_house() -> None:
        while unfinished():
            expire(database)

    answers: list[str | None] = []

    def change_one_s_mind() -> None:
        answers.append(cancel(database, "job-3"))

    acts = [lambda: work("w1"), lambda: work("w2"), lambda: work("w3"), keep_house, change_one_s_mind]
    assert run_all(*acts) == []

    check_laws(database)
    for job_id in jobs[:3]:
        assert Counter(row.status for row in requests_of(database, job_id).values()) == {"completed": 6}
    # The cancel may come too late, but an accepted cancel is kept.
    assert view(database, "job-3").status == ("completed" if answers == ["completed"] else "cancelled")
