from __future__ import annotations

import threading

from storage.leader_election import elect, resign
from storage.session import Database


def leads(database: Database, candidate: str, lease_s: float = 30.0) -> bool:
    with database.write() as session:
        return elect(session, "reconciler", candidate, lease_s)


def test_one_leads_until_its_lease_expires(database: Database) -> None:
    assert leads(database, "a")
    assert leads(database, "a")
    assert not leads(database, "b")

    assert leads(database, "a", lease_s=-1.0)
    assert leads(database, "b")
    assert not leads(database, "a")


def test_a_leader_that_resigns_can_be_followed_at_once(database: Database) -> None:
    leads(database, "a")
    with database.write() as session:
        resign(session, "reconciler", "b")  # does not lead
    assert not leads(database, "b")

    with database.write() as session:
        resign(session, "reconciler", "a")
    assert leads(database, "b")


def test_of_many_candidates_at_once_one_is_elected(database: Database) -> None:
    elected: list[str] = []
    start = threading.Barrier(6)

    def stand(candidate: str) -> None:
        start.wait()
        if leads(database, candidate):
            elected.append(candidate)

    threads = [threading.Thread(target=stand, args=(f"c{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(elected) == 1
