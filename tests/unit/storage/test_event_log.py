from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import update

from storage import event_log
from storage.event_log import Cursor, Page, Position
from storage.models import JobRow, Request
from storage.records import Claim, NewRequest, RequestFailure, RequestPlan, RequestProgress
from storage.session import Database
from tests.databases import on_shared_sqlite
from tests.factories import a_request
from tests.unit.storage.acts import cancel, claim, end_of, flush, going_on, record, tokens_of, whole

FAILURE = RequestFailure("invalid_value", "No.")


def page(database: Database, since: Cursor, limit: int = 100) -> Page:
    with database.read() as session:
        return event_log.read(session, "job-1", since, limit)


class Reader:
    """Reads the event log in pages and collects it. Keeps nothing but its cursor between reads."""

    def __init__(self) -> None:
        self.cursor = Cursor()
        self.texts: defaultdict[tuple[int, int], str] = defaultdict(str)
        self.tokens: defaultdict[tuple[int, int], int] = defaultdict(int)
        self.seqs: dict[tuple[int, int], int] = {}
        self.ends: list[tuple[int, int]] = []

    def read(self, database: Database, limit: int = 100, *, leave_after: int | None = None) -> bool:
        """Read one page, or only some events of it; return whether the log is complete for now."""
        told = page(database, self.cursor, limit)
        events = told.events if leave_after is None else told.events[:leave_after]
        for event in events:
            key = (event.request_index, event.choice_index)
            if event.kind == "tokens":
                again = event.seq <= self.seqs.get(key, -1)
                self.seqs[key] = max(event.seq, self.seqs.get(key, -1))
                if again:
                    self.cursor = event.cursor or self.cursor
                    continue
                before = "" if event.from_start else self.texts[key]
                self.texts[key] = before + event.text
                self.tokens[key] = event.tokens + (0 if event.from_start else self.tokens[key])
                assert "".join(text for text, _ in event.pieces) == event.text
            else:
                self.ends.append(key)
            if event.cursor is not None:
                self.cursor = event.cursor
        if len(events) == len(told.events):
            self.cursor = told.cursor
        return told.complete and len(events) == len(told.events)

    def read_all(self, database: Database, limit: int = 100) -> None:
        while not self.read(database, limit):
            pass


def test_a_new_reader_receives_open_and_ended_choices(database: Database) -> None:
    record(database, requests=[a_request("a"), a_request("b"), NewRequest("c", failure=FAILURE)])
    first, second = claim(database, limit=2)
    flush(database, "w1", whole(first.lease, 1, 2), RequestProgress(second.lease, (tokens_of(1, 1),)))
    flush(database, "w1", RequestProgress(second.lease, (tokens_of(2, 2),)))
    reader = Reader()
    reader.read_all(database)
    assert reader.texts == {(0, 0): "yxy", (1, 0): "yxy"}
    assert reader.ends == [(2, 0), (0, 0)]


def test_events_carry_text_pieces_and_counts_as_far_as_committed(database: Database) -> None:
    record(database, requests=3)
    first, second, _ = claim(database, limit=3)
    flush(database, "w1", RequestProgress(first.lease, (tokens_of(1, 1, 3), tokens_of(2, 2, first=2))))
    flush(database, "w1", whole(second.lease, 1, 2))
    running, written, end = page(database, Cursor()).events
    assert (running.custom_id, running.text, running.seq, running.from_start) == ("request-0", "yxxyxy", 2, True)
    assert running.pieces == (("y", "target"), ("xx", "draft"), ("y", "target"), ("x", "draft"), ("y", "target"))
    assert (running.tokens, running.accepted, running.finish_reason) == (6, 3, None)
    assert (written.custom_id, written.text, written.seq) == ("request-1", "yxy", 1)
    assert written.pieces == (("y", "target"), ("x", "draft"), ("y", "target"))
    assert (written.tokens, written.accepted) == (3, 1)
    assert (end.kind, end.seq, end.finish_reason) == ("finished", 2, "stop")


def test_only_events_with_a_text_from_its_start_carry_its_format(database: Database) -> None:
    record(database)
    form = {"reasoning": {"start": "<think>", "end": "</think>"}}
    claimed = claim(database, "w1")[0]

    def told(since: Cursor) -> tuple[list[object], Cursor]:
        read = page(database, since)
        return [event.answer_format for event in read.events if event.kind == "tokens"], read.cursor

    before = page(database, Cursor()).cursor
    flush(database, "w1", RequestProgress(claimed.lease, (tokens_of(1, 1),), plan=RequestPlan(form)))
    _, first = told(before)
    assert told(before)[0] == [form]
    flush(database, "w1", RequestProgress(claimed.lease, (tokens_of(2, 1),)))
    assert told(first)[0] == [None]
    assert told(Cursor())[0] == [form], "a snapshot"
    _, second = told(first)
    ended = RequestProgress(
        claimed.lease, (tokens_of(3, 1),), (end_of(*map(tokens_of, (1, 2, 3), (1, 1, 1))),), ends=True
    )
    flush(database, "w1", ended)
    assert told(second)[0] == [None]
    assert told(Cursor())[0] == told(before)[0] == [form]


def test_events_carry_the_error_of_requests_without_a_result(database: Database) -> None:
    record(database, requests=[NewRequest("bad", failure=FAILURE), a_request("running"), a_request("queued")])
    (claimed,) = claim(database)
    flush(database, "w1", RequestProgress(claimed.lease, (tokens_of(1, 1),)))
    cancel(database)
    flush(database, "w1", held=[claimed.lease])
    failed = {event.custom_id: event for event in page(database, Cursor()).events if event.kind == "failed"}
    codes = {name: event.error and event.error["code"] for name, event in failed.items()}
    assert codes == {"bad": "invalid_value", "running": "batch_cancelled", "queued": "batch_cancelled"}
    assert failed["running"].seq == 2, "it follows the text that was written"


def test_a_reader_that_reconnects_receives_only_the_missing_part_of_an_ended_text(database: Database) -> None:
    record(database)
    (claimed,) = claim(database)
    seen, unseen = tokens_of(1, 1, 2), tokens_of(2, 3, first=2)
    flush(database, "w1", RequestProgress(claimed.lease, (seen,)))
    cursor = Cursor()
    while not (told := page(database, cursor)).complete:
        cursor = told.cursor
    flush(database, "w1", RequestProgress(claimed.lease, (unseen,), (end_of(seen, unseen),), ends=True))
    text, end = page(database, told.cursor).events
    assert (text.text, text.tokens, text.accepted, text.from_start, text.seq) == ("xxy", 3, 2, False, 2)
    assert (end.kind, end.seq) == ("finished", 3)
    assert page(database, told.cursor).status == "completed"


def test_a_cursor_of_another_log_counts_as_a_new_reader(database: Database) -> None:
    record(database)
    flush(database, "w1", whole(claim(database)[0].lease, 1, 2))
    with database.read() as session:
        end = event_log.head(session, "job-1").cursor
    assert end.within(end) == end
    for other in (Cursor(1000), Cursor(0, until=9), Cursor(0, status="completed")):
        assert other.within(end) == Cursor()


def test_a_reader_that_disconnects_between_outputs_receives_all_others(database: Database) -> None:
    record(database, requests=3)
    claims = claim(database, limit=3)
    made = [tokens_of(1, 1), tokens_of(2, 2, first=1)]
    flush(database, "w1", *(RequestProgress(each.lease, (made[0],)) for each in claims))
    for each in claims:
        flush(database, "w1", RequestProgress(each.lease, (made[1],), (end_of(*made),), ends=True))
    told = page(database, Cursor()).events
    for seen in range(1, len(told) + 1):
        assert told[seen - 1].cursor is not None
        rest = page(database, told[seen - 1].cursor or Cursor()).events
        assert [(each.request_index, each.text) for each in rest] == [
            (each.request_index, each.text) for each in told[seen:]
        ]


def test_requests_that_end_in_one_commit_can_be_read_in_many_pages(database: Database) -> None:
    record(database, requests=7)
    cancel(database)
    reader = Reader()
    reader.read_all(database, limit=2)
    assert reader.ends == [(index, 0) for index in range(7)]


def test_requests_that_are_rejected_while_the_input_is_read_are_delivered(database: Database) -> None:
    record(database, requests=[NewRequest("a", failure=FAILURE), a_request("b"), NewRequest("c", failure=FAILURE)])
    set_status(database, "validating", without=2)
    reader = Reader()
    reader.read_all(database)
    with database.read() as session:
        watching = event_log.head(session, "job-1").cursor
    set_status(database, "in_progress", without=None)
    reader.read_all(database)
    assert reader.ends == [(0, 0), (2, 0)]
    assert len(page(database, watching).events) == 2


def set_status(database: Database, status: str, without: int | None) -> None:
    """Set a job's status and hide its requests from an index on, as while its input is read; or show them again."""
    with database.write() as session:
        session.execute(update(JobRow).values(status=status))
        if without is None:
            session.execute(update(Request).where(Request.event_number == -9).values(event_number=0))
        else:
            session.execute(update(Request).where(Request.request_index >= without).values(event_number=-9))


def test_requests_are_listed_in_the_order_in_which_they_ended(database: Database) -> None:
    record(database, requests=3)
    claims = claim(database, limit=3)
    for claimed in (claims[2], claims[0], claims[1]):
        flush(database, "w1", whole(claimed.lease, 1))
    with database.read() as session:
        first = event_log.ended_requests(session, "job-1", Position(-1), 2)
        rest = event_log.ended_requests(session, "job-1", first[-1][0], 2)
    assert [index for _, index in first + rest] == [2, 0, 1]


ACTS = st.lists(
    st.tuples(st.sampled_from(["write", "end", "fail", "read", "part"]), st.integers(0, 3), st.integers(1, 4)),
    max_size=25,
)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(acts=ACTS)
def test_all_text_is_delivered_once_for_any_writes_between_reads(acts: list[tuple[str, int, int]]) -> None:
    with TemporaryDirectory() as folder, on_shared_sqlite(Path(folder)) as database:
        _read_while_written(database, acts)


def _read_while_written(database: Database, acts: list[tuple[str, int, int]]) -> None:
    record(database, requests=4)
    live: dict[int, Claim] = {each.lease.request_index: each for each in claim(database, limit=4)}
    written: dict[int, list[int]] = {index: [] for index in live}
    checkpoints = {index: [] for index in live}  # type: ignore[var-annotated]
    reader = Reader()
    failed = set()
    for act, index, count in acts:
        if act in ("read", "part"):
            reader.read(database, limit=count, leave_after=count - 1 if act == "part" else None)
        elif index in live:
            lease = live[index].lease
            if act == "fail":
                flush(database, "w1", RequestProgress(lease, failure=FAILURE))
                failed.add(index)
            else:
                checkpoints[index].append(tokens_of(len(checkpoints[index]) + 1, count, first=1))
                written[index].append(count)
                finished = (end_of(*checkpoints[index]),) if act == "end" else ()
                flush(database, "w1", RequestProgress(lease, (checkpoints[index][-1],), finished, ends=act == "end"))
            if act in ("fail", "end"):
                del live[index]
    reader.read_all(database, limit=2)
    texts = {(i, 0): "".join(c.text for c in made) for i, made in checkpoints.items() if made}
    assert reader.texts == texts
    assert reader.tokens == {key: len(text) for key, text in texts.items()}
    ended = set(written) - set(live)
    assert sorted(reader.ends) == sorted((index, 0) for index in ended)


@pytest.mark.parametrize("act", ["cancel", "whole", "going_on"])
def test_event_numbers_follow_commit_order(database: Database, act: str) -> None:
    record(database, requests=2)
    before = page(database, Cursor()).cursor.base
    if act == "cancel":
        cancel(database)
    else:
        (claimed,) = claim(database)
        flush(database, "w1", whole(claimed.lease, 1) if act == "whole" else going_on(claimed, 1))
    assert page(database, Cursor()).cursor.base > before
