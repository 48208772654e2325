"""Find jobs: by label, name, status and text, one page after the other."""

from __future__ import annotations

from typing import Any

import pytest

from storage import job_filter, queries
from storage.job_changes import change_job, lock_job
from storage.job_filter import JobFilter
from storage.models import JobLabel, JobText
from storage.pausing import pause_job
from storage.session import Database
from tests.unit.storage.acts import cancel, record
from tests.unit.storage.test_plans import plans_of


def found(database: Database, **wanted: Any) -> set[str]:
    with database.read() as session:
        return {job.id for job in queries.jobs(session, 10, wanted=JobFilter(**wanted)).jobs}


def change(database: Database, job_id: str, **columns: Any) -> None:
    with database.write() as session:
        locked = lock_job(session, job_id)
        assert locked is not None
        change_job(session, locked, columns)


def record_some(database: Database) -> None:
    record(database, "a", name="Nightly summary", metadata={"team": "search", "run": "1"}, api_key_id="k1")
    record(database, "b", name="Nightly summary", metadata={"team": "search", "run": "2"}, api_key_id="k2")
    record(database, "c", metadata={"team": "ÄRZTE"}, model="large")
    record(database, "d")
    record(database, "chat", priority=1, metadata={"team": "search"})


def test_a_list_holds_the_jobs_that_meet_all_of_its_conditions(database: Database) -> None:
    record_some(database)

    assert found(database) == {"a", "b", "c", "d"}
    assert found(database, labels=(("team", "search"),)) == {"a", "b"}
    assert found(database, labels=(("team", None),)) == {"a", "b", "c"}
    assert found(database, labels=(("team", "search"), ("run", "2"))) == {"b"}
    assert found(database, labels=(("team", "sea"),)) == set()
    assert found(database, name="Nightly summary", owner="k1") == {"a"}
    assert found(database, name="Nightly") == set()
    assert found(database, model="large") == {"c"}
    record(database, "again", verification_of="a", api_key_id="k1")
    assert "again" not in found(database), "a verification is in the list of its job alone"
    assert found(database, verification_of="a", owner="k1") == {"again"}
    assert found(database, verification_of="a", owner="k2") == found(database, verification_of="b") == set()


def test_a_search_reads_names_and_labels_in_any_case_and_the_start_of_ids(database: Database) -> None:
    record_some(database)

    assert found(database, search="SUMM") == {"a", "b"}
    assert found(database, search="run=2") == {"b"}
    assert found(database, search="ärzte") == {"c"}
    assert found(database, search="%") == found(database, search="_") == set()
    assert found(database, search="d") == {"d"}


def test_a_status_is_that_which_readers_see(database: Database) -> None:
    record_some(database)
    cancel(database, "d")
    with database.write() as session:
        pause_job(session, "a")

    assert found(database, statuses=("paused",)) == {"a"}
    assert found(database, statuses=("in_progress",)) == {"b", "c"}
    assert found(database, statuses=("paused", "in_progress")) == {"a", "b", "c"}
    assert found(database, statuses=("cancelled", "paused")) == {"a", "d"}


def test_a_job_is_found_by_what_it_was_changed_to_and_no_more_by_what_it_was(database: Database) -> None:
    record_some(database)
    change(database, "a", name="Weekly")
    change(database, "b", metadata_={"team": "ads"})
    change(database, "c", metadata_=None)

    assert found(database, name="Weekly") == found(database, search="weekly") == {"a"}
    assert found(database, labels=(("team", "search"),)) == {"a"}
    assert found(database, labels=(("team", None),)) == {"a", "b"}
    assert found(database, search="ärzte") == set()
    with database.read() as session:
        assert (session.query(JobLabel).count(), session.query(JobText).count()) == (3, 2)


def test_a_label_of_half_a_surrogate_pair_is_stored_as_the_replacement_character(database: Database) -> None:
    record(database, metadata=dict.fromkeys(("a\ud800", "a\udbff"), "b\udfff"))
    assert found(database, search="a\ufffd=") == {"job-1"}


def test_a_label_or_text_of_many_jobs_finds_the_same_as_one_of_few(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_some(database)
    wanted: list[dict[str, Any]] = [
        {"labels": (("team", "search"),)},
        {"labels": (("team", None), ("run", "2"))},
        {"search": "nightly"},
        {"search": "nowhere"},
    ]
    few = [found(database, **one) for one in wanted]
    monkeypatch.setattr(job_filter, "_FEW_JOBS", 0)

    assert [found(database, **one) for one in wanted] == few == [{"a", "b"}, {"b"}, {"a", "b"}, set()]


def test_pages_of_labelled_jobs_follow_each_other(database: Database) -> None:
    for number in range(5):
        record(database, f"job-{number}", metadata={"even": str(number % 2 == 0)})
    wanted = JobFilter(labels=(("even", "True"),))
    with database.read() as session:
        first = queries.jobs(session, 2, wanted=wanted)
        second = queries.jobs(session, 2, first.jobs[-1].id, wanted)
    assert [job.id for job in (*first.jobs, *second.jobs)] == ["job-4", "job-2", "job-0"]
    assert (first.has_more, second.has_more) == (True, False)


def test_labels_names_and_rare_statuses_are_found_by_an_index(sqlite: Database) -> None:
    record(sqlite)

    def steps(**wanted: Any) -> str:
        plans = plans_of(sqlite, lambda: found(sqlite, **wanted))
        return "\n".join(step for plan in plans.values() for step in plan)

    assert "ix_job_labels_key_value_created_at_job_id (key=? AND value=?)" in steps(labels=(("team", "a"),))
    assert "ix_jobs_name_created_at_id (name=?)" in steps(name="n")
    assert "ix_jobs_status_created_at_id (status=?)" in steps(statuses=("failed",))
