from __future__ import annotations

from typing import Any

from jobs.client.event_filter import EventFilter
from jobs.messages import JobStatus, PartialEvent


def event(seq: int, kind: Any = "tokens", index: int = 0, choice: int = 0) -> PartialEvent:
    return PartialEvent(job_id="batch_1", request="a", index=index, choice=choice, seq=seq, type=kind)


def job(status: JobStatus) -> PartialEvent:
    return PartialEvent(job_id="batch_1", type="job", status=status)


def test_each_event_is_accepted_once() -> None:
    event_filter = EventFilter()
    assert [event_filter.accept(event(seq)) for seq in (0, 1, 1, 0, 2)] == [True, True, False, False, True]


def test_every_choice_has_its_own_sequence() -> None:
    event_filter = EventFilter()
    event_filter.accept(event(5))
    assert event_filter.accept(event(0, choice=1))
    assert event_filter.accept(event(0, index=1))


def test_no_event_is_accepted_after_the_end_of_a_choice() -> None:
    event_filter = EventFilter()
    assert event_filter.accept(event(3, "finished"))
    assert not event_filter.accept(event(4))


def test_a_failed_event_is_accepted_once_with_any_seq() -> None:
    event_filter = EventFilter()
    event_filter.accept(event(4))
    assert event_filter.accept(event(0, "failed"))
    assert not event_filter.accept(event(5, "failed"))


def test_a_changed_job_status_is_accepted() -> None:
    event_filter = EventFilter()
    assert event_filter.accept(job(JobStatus.IN_PROGRESS))
    assert not event_filter.accept(job(JobStatus.IN_PROGRESS))
    assert event_filter.accept(job(JobStatus.CANCELLING))
