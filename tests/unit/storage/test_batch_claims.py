from __future__ import annotations

from storage import batches
from storage.session import Database
from tests.unit.storage.acts import record


def claimed(database: Database) -> str | None:
    with database.write() as session:
        claim = batches.claim_batch(session, 30.0)
    return None if claim is None else claim.job_id


def test_the_oldest_batch_is_claimed_first_but_one_of_each_owner_before_two_of_one(database: Database) -> None:
    for job_id, owner in (("a1", "alice"), ("a2", "alice"), ("a3", "alice"), ("b1", "bob")):
        record(database, job_id, 0, api_key_id=owner, input_file_id="file-1")

    assert [claimed(database) for _ in range(5)] == ["a1", "b1", "a2", "a3", None]
