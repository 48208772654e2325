from __future__ import annotations

import threading

from storage.leader_election import elect, resign
from storage.session import Database


def stands(database: Database, candidate: str, term_s: float = 30.0) -> bool:
    with database.write() as session:
        return elect(session, "reconciler", candidate, term_s)


def test_one_holds_the_office_until_the_term_is_over(database: Database) -> None:
    assert stands(database, "a")
    assert stands(database, "a")
    assert not stands(database, "b")

    assert stands(database, "a", term_s=-1.0)
    assert stands(database, "b")
    assert not stands(database, "a")


def test_whoever_resigns_makes_room_at_once(database: Database) -> None:
    stands(database, "a")
    with database.write() as session:
        resign(session, "reconciler", "b")  # is not in office
    assert not stands(database, "b")

    with database.write() as session:
        resign(session, "reconciler", "a")
    assert stands(database, "b")


def test_of_many_that_stand_at_once_one_is_elected(database: Database) -> None:
    elected: list[str] = []
    start = threading.Barrier(6)

    def stand(candidate: str) -> None:
        start.wait()
        if stands(database, candidate):
            elected.append(candidate)

    threads = [threading.Thread(target=stand, args=(f"c{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(elected) == 1
