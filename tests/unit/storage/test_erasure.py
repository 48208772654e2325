"""What is erased, or is older than it may be, leaves no row behind, and takes nothing of others along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, text

from storage import erasure, files, keys, prune, queries, webhooks
from storage.models import Base, ChoiceOutput, File, PackedSteps, Request, UploadRow
from storage.prune import Ages, Kept
from storage.records import NewKey
from storage.session import Database
from storage.webhooks import EVENT_TYPES, NewEndpoint
from tests.factories import a_request
from tests.unit.storage.acts import cancel, claim, flush, going_on, record, view, whole


def counts(database: Database) -> dict[str, int]:
    with database.read() as session:
        tables = Base.metadata.sorted_tables
        found = {table.name: session.scalar(select(func.count()).select_from(table)) or 0 for table in tables}
    return {name: count for name, count in found.items() if count}


def decode(database: Database, *job_ids: str, requests: int = 3, **fields: Any) -> None:
    """Complete the first request of each job, leave a checkpoint of the second, and cancel the rest."""
    for job_id in job_ids:
        record(database, job_id, requests, **fields)
    for claimed in claim(database, limit=2 * len(job_ids)):
        first = claimed.lease.request_index == 0
        flush(database, "w1", whole(claimed.lease, 1, 2) if first else going_on(claimed, 2))
    for job_id in job_ids:
        cancel(database, job_id)
    with database.write() as session:
        session.execute(text("UPDATE requests SET status = 'cancelled', finished_at = 1.0 WHERE status = 'running'"))
        session.execute(text("UPDATE jobs SET status = 'cancelled', finished_at = 1.0 WHERE status = 'cancelling'"))


def erased(database: Database, job_id: str) -> None:
    with database.write() as session:
        erasure.hide_job(session, job_id)
    for _ in erasure.erase_job(database, job_id):
        pass


def a_file(database: Database, file_id: str, upload: bool = False, chunks: int = 1) -> str:
    with database.write() as session:
        files.begin_file(session, file_id, "batch", "names.jsonl", "")
        for index in range(chunks):
            files.append_chunk(session, file_id, index, b"secret")
        files.finish_file(session, file_id, 6 * chunks, None, "batch")
        if upload:
            made = {"id": "upload_1", "filename": "names.jsonl", "purpose": "batch", "bytes": 6, "api_key_id": ""}
            made |= {"status": "completed", "file_id": file_id, "created_at": 1.0, "expires_at": 2.0}
            session.add(UploadRow(**made))
    return file_id


def test_a_job_that_is_erased_leaves_no_row_in_any_table_and_others_stay(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "REQUESTS_PER_DELETE", 2)
    before = counts(database)
    decode(database, "other")
    others = counts(database)
    new = NewEndpoint("wh_1", "", "", "https://example.com/", EVENT_TYPES, "whsec_c2VjcmV0", job_id="mine")
    record(database, "mine", 5, idempotency_key="k")
    with database.write() as session:
        webhooks.add_endpoint(session, new)
    for claimed in claim(database, limit=4):
        flush(database, "w1", whole(claimed.lease, 1, 2))
    cancel(database, "mine")
    assert counts(database)["webhook_deliveries"] == 1
    erased(database, "mine")
    assert {name: n for name, n in counts(database).items() if name != "served"} == {
        name: n for name, n in (before | others).items() if name != "served"
    }
    assert record(database, "again", 1, idempotency_key="k").created


def test_a_hidden_job_is_seen_by_nobody_and_an_interrupted_erasure_continues(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "REQUESTS_PER_DELETE", 1)
    decode(database, "mine")
    with database.write() as session:
        erasure.hide_job(session, "mine")
    with database.read() as session:
        assert queries.job(session, "mine") is None
        assert queries.jobs(session, 10).jobs == ()
        assert erasure.hidden_jobs(session) == ["mine"]
    pieces = erasure.erase_job(database, "mine")
    assert next(pieces) == 1
    pieces.close()  # the process dies here
    assert counts(database)["requests"] == 2
    assert sum(erasure.erase_job(database, "mine")) == 2
    with database.read() as session:
        assert (erasure.hidden_jobs(session), counts(database).get("jobs")) == ([], None)


def test_a_job_that_still_runs_is_erased_when_it_has_ended(database: Database) -> None:
    record(database)
    with database.write() as session:
        erasure.hide_job(session, "job-1")
        assert erasure.hidden_jobs(session) == []
    cancel(database)
    with database.read() as session:
        assert erasure.hidden_jobs(session) == ["job-1"]


def test_files_go_with_their_job_unless_another_job_reads_them(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNKS_PER_DELETE", 2)
    own, shared = a_file(database, "own", upload=True, chunks=5), a_file(database, "shared")
    a_file(database, "read")
    for job_id, fields in {
        "mine": {"source_file_id": own},
        "mine too": {"input_file_id": shared},
        "other": {"source_file_id": shared},
    }.items():
        record(database, job_id, 0, **fields)
    with database.write() as session:
        session.execute(text("UPDATE jobs SET status = 'completed', output_file_id = 'read' WHERE id = 'mine too'"))
    erased(database, "mine")
    erased(database, "mine too")
    with database.read() as session:
        rows = session.execute(select(File.id, File.status, File.filename).order_by(File.id)).all()
        assert [tuple(row) for row in rows] == [
            ("own", "cleared", ""),
            ("read", "cleared", ""),
            ("shared", "ready", "names.jsonl"),
        ]
    assert (counts(database)["file_chunks"], counts(database).get("uploads")) == (1, None)
    erased(database, "other")
    assert "file_chunks" not in counts(database)


def pruned(database: Database, ages: Ages) -> dict[Kept, int]:
    found: dict[Kept, int] = {}
    for kept, count in prune.prune(database, ages):
        found[kept] = found.get(kept, 0) + count
    return {kept: count for kept, count in found.items() if count}


def aged(database: Database, *job_ids: str, by_s: float = 7200.0) -> None:
    with database.write() as session:
        for job_id in job_ids:
            session.execute(
                text("UPDATE jobs SET finished_at = (SELECT max(finished_at) FROM jobs j) - :s WHERE id = :id"),
                {"s": by_s, "id": job_id},
            )


def finished(database: Database, *job_ids: str, requests: int = 2, **fields: Any) -> None:
    for job_id in job_ids:
        record(database, job_id, requests, **fields)
    for claimed in claim(database, limit=requests * len(job_ids)):
        flush(database, "w1", whole(claimed.lease, 1, 2))


def test_prompts_outputs_and_steps_are_pruned_each_by_its_age_and_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "REQUESTS_PER_DELETE", 2)
    finished(database, "old", "older", requests=3)
    finished(database, "young")
    aged(database, "old", "older")
    hour = 3600.0
    assert pruned(database, Ages(prompts_s=hour)) == {Kept.PROMPTS: 6}
    assert pruned(database, Ages(prompts_s=hour)) == {}
    with database.read() as session:
        assert session.scalar(select(func.count()).where(Request.body.is_not(None))) == 2
        assert session.scalar(select(func.count()).select_from(ChoiceOutput)) == 8, "outputs have an age of their own"
    assert pruned(database, Ages(outputs_s=hour, steps_s=hour)) == {Kept.OUTPUTS: 6, Kept.STEPS: 12}
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(ChoiceOutput)) == 2
        assert session.scalar(select(func.count()).select_from(PackedSteps)) == 2
        for output in queries.outputs(session, "old"):
            assert (output.error_code, output.error_status_code) == ("output_deleted", 410)
        assert all(output.error_code is None for output in queries.outputs(session, "young"))
    found = view(database, "old")
    assert (found.requests_completed, found.prompts_deleted_at is not None) == (3, True)
    assert view(database, "young").outputs_deleted_at is None


def test_a_key_keeps_its_own_ages_and_the_others_those_of_the_installation(database: Database) -> None:
    with database.write() as session:
        keys.add_key(session, NewKey("brief", "a", "x", ("submit",), outputs_kept_s=60.0, files_kept_s=60.0))
        keys.add_key(session, NewKey("long", "b", "y", ("submit",), outputs_kept_s=1e6))
    for key in ("brief", "long", ""):
        finished(database, f"of {key}", api_key_id=key)
    aged(database, "of brief", "of long", "of ")
    assert pruned(database, Ages()) == {Kept.OUTPUTS: 2}, "only that key has an age"
    assert pruned(database, Ages(outputs_s=3600.0)) == {Kept.OUTPUTS: 2}
    assert view(database, "of long").outputs_deleted_at is None
    assert pruned(database, Ages(outputs_s=3600.0, by_key=False)) == {Kept.OUTPUTS: 2}


def test_a_file_lives_no_longer_than_its_key_allows(database: Database) -> None:
    with database.write() as session:
        keys.add_key(session, NewKey("brief", "a", "x", ("submit",), files_kept_s=60.0))
        for file_id, owner in (("brief's", "brief"), ("open", "")):
            files.begin_file(session, file_id, "batch", "names.jsonl", owner)
            files.append_chunk(session, file_id, 0, b"secret")
            files.finish_file(session, file_id, 6, 3600.0, "batch")
        lives_s = {file_id: files.file(session, file_id) for file_id in ("brief's", "open")}
        assert {file_id: round((f.expires_at or 0) - f.created_at) for file_id, f in lives_s.items() if f} == {
            "brief's": 60,
            "open": 3600,
        }
        session.execute(text("UPDATE files SET created_at = created_at - 100, expires_at = NULL"))
    assert pruned(database, Ages()) == {Kept.FILES: 1}
    assert pruned(database, Ages(files_s=50.0)) == {Kept.FILES: 1}
    assert "file_chunks" not in counts(database)


def test_texts_leave_the_bytes_of_the_database_file(sqlite: Database, tmp_path: Path) -> None:
    body = {"v": 1, "model": "tiny", "prompt": "Rumpelstilzchen" * 9, "sampling": {"seed": 1}}
    record(sqlite, "mine", [a_request(body=body)])
    cancel(sqlite, "mine")

    def bytes_on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.glob("basic.sqlite3*")))

    assert b"Rumpelstilzchen" in bytes_on_disk()
    erased(sqlite, "mine")
    assert erasure.forget_deleted(sqlite)
    assert b"Rumpelstilzchen" not in bytes_on_disk()
