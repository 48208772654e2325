from __future__ import annotations

from typing import Any

from jobs.client.event_filter import Reader
from jobs.messages import JobStatus, PartialEvent


def event(seq: int, kind: Any = "tokens", index: int = 0, choice: int = 0) -> PartialEvent:
    return PartialEvent(job_id="batch_1", request="a", index=index, choice=choice, seq=seq, type=kind)


def job(status: JobStatus) -> PartialEvent:
    return PartialEvent(job_id="batch_1", type="job", status=status)


def test_events_in_order_are_news_once() -> None:
    reader = Reader()
    assert [reader.take(event(seq)) for seq in (0, 1, 1, 0, 2)] == [True, True, False, False, True]


def test_a_gap_does_not_follow() -> None:
    reader = Reader()
    reader.take(event(0))
    assert reader.follows(event(1))
    assert not reader.follows(event(2))


def test_every_choice_of_every_request_counts_for_itself() -> None:
    reader = Reader()
    reader.take(event(5))
    assert reader.take(event(0, choice=1))
    assert reader.take(event(0, index=1))


def test_nothing_comes_after_the_end_of_a_choice() -> None:
    reader = Reader()
    assert reader.take(event(3, "finished"))
    assert not reader.take(event(4))


def test_a_failure_is_news_whatever_its_number_and_only_once() -> None:
    reader = Reader()
    reader.take(event(4))
    assert reader.take(event(0, "failed"))
    assert not reader.take(event(5, "failed"))


def test_the_status_of_a_job_is_news_when_it_changes_and_sends_the_reader_to_sql() -> None:
    reader = Reader()
    assert reader.take(job(JobStatus.IN_PROGRESS))
    assert not reader.take(job(JobStatus.IN_PROGRESS))
    assert reader.take(job(JobStatus.CANCELLING))
    assert not reader.follows(job(JobStatus.CANCELLED))
