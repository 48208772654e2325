from __future__ import annotations

from typing import Any

from jobs.client.event_filter import EventFilter
from jobs.messages import JobStatus, PartialEvent


def event(seq: int, kind: Any = "tokens", index: int = 0, choice: int = 0) -> PartialEvent:
    return PartialEvent(job_id="batch_1", request="a", index=index, choice=choice, seq=seq, type=kind)


def job(status: JobStatus) -> PartialEvent:
    return PartialEvent(job_id="batch_1", type="job", status=status)


def test_events_in_order_are_news_once() -> None:
    event_filter = EventFilter()
    assert [event_filter.accept(event(seq)) for seq in (0, 1, 1, 0, 2)] == [True, True, False, False, True]


def test_a_gap_does_not_follow() -> None:
    event_filter = EventFilter()
    event_filter.accept(event(0))
    assert event_filter.is_next(event(1))
    assert not event_filter.is_next(event(2))


def test_every_choice_of_every_request_counts_for_itself() -> None:
    event_filter = EventFilter()
    event_filter.accept(event(5))
    assert event_filter.accept(event(0, choice=1))
    assert event_filter.accept(event(0, index=1))


def test_nothing_comes_after_the_end_of_a_choice() -> None:
    event_filter = EventFilter()
    assert event_filter.accept(event(3, "finished"))
    assert not event_filter.accept(event(4))


def test_a_failure_is_news_whatever_its_number_and_only_once() -> None:
    event_filter = EventFilter()
    event_filter.accept(event(4))
    assert event_filter.accept(event(0, "failed"))
    assert not event_filter.accept(event(5, "failed"))


def test_the_status_of_a_job_is_news_when_it_changes_and_sends_the_reader_to_sql() -> None:
    event_filter = EventFilter()
    assert event_filter.accept(job(JobStatus.IN_PROGRESS))
    assert not event_filter.accept(job(JobStatus.IN_PROGRESS))
    assert event_filter.accept(job(JobStatus.CANCELLING))
    assert not event_filter.is_next(job(JobStatus.CANCELLED))
