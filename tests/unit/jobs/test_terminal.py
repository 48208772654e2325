from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jobs.messages import JobStatus, PartialEvent, Piece
from jobs.results import JobInfo, Progress, RequestCounts
from jobs.terminal import STYLES, Transcript, closing_table, make_view, safe


def some_info(total: int = 2, completed: int = 2) -> JobInfo:
    return JobInfo(
        id="batch_1",
        status=JobStatus.COMPLETED,
        model="tiny",
        endpoint="/v1/chat/completions",
        created_at=0,
        request_counts=RequestCounts(total=total, completed=completed),
        progress=Progress(),
    )


def event(kind: Any, index: int = 0, choice: int = 0, **fields: Any) -> PartialEvent:
    return PartialEvent(job_id="batch_1", request=f"r{index}", index=index, choice=choice, type=kind, **fields)


def written(*pieces: tuple[str, str], index: int = 0, snapshot: bool = False) -> PartialEvent:
    made = tuple(Piece.model_validate({"text": text, "source": source}) for text, source in pieces)
    accepted = sum(source == "draft" for _, source in pieces)
    text = "".join(piece.text for piece in made)
    return event("tokens", index, pieces=made, text=text, tokens=len(made), accepted=accepted, snapshot=snapshot)


def shown(events: list[PartialEvent], *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, height=24, color_system="standard")
    with make_view(console, some_info()) as view:
        for each in events:
            view.show(each)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("plain\ttext\nand more", "plain\ttext\nand more"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07rest", "rest"),
        ("\x1b]8;;http://evil\x1b\\link", "link"),
        ("back\x08\r\x00", "back"),
        ("\x9b31mC1", "31mC1"),
        ("\u202eesrever", "esrever"),
        ("\x1b", ""),
    ],
)
def test_text_of_a_model_can_not_steer_the_terminal(text: str, left: str) -> None:
    assert safe(text) == left


def test_draft_tokens_and_target_tokens_have_their_own_colours() -> None:
    transcript = Transcript()
    transcript.add(written(("The", "target"), (" capital", "draft")))
    [choice] = transcript.running
    text = choice.rich_text()
    assert text.plain == "The capital"
    assert [span.style for span in text.spans] == [STYLES["target"], STYLES["draft"]]


def test_a_snapshot_replaces_what_was_written() -> None:
    transcript = Transcript()
    transcript.add(written(("The", "target")))
    transcript.add(written(("The", "target"), (" capital", "draft"), snapshot=True))
    [choice] = transcript.running
    assert (choice.rich_text().plain, choice.tokens, choice.accepted) == ("The capital", 2, 1)


def test_a_request_has_ended_when_its_choices_have() -> None:
    transcript = Transcript()
    for each in (event("started"), event("started", choice=1), event("finished", finish_reason="stop")):
        transcript.add(each)
    assert transcript.ended_requests == 0
    transcript.add(event("finished", choice=1, finish_reason="stop"))
    assert transcript.ended_requests == 1


def test_away_from_a_terminal_there_are_plain_lines() -> None:
    failed = event("failed", 1, error={"message": "line 2: The line is not JSON."})
    text = shown(
        [written(("Pa", "target"), ("ris\x1b[2J", "draft")), event("finished", finish_reason="stop"), failed],
        terminal=False,
    )
    assert text.splitlines() == [
        "[1/2] r0 (2 tokens, 1 from the draft, stop)",
        "Paris",
        "[2/2] r1: line 2: The line is not JSON.",
        "",
    ]


def test_on_a_terminal_there_is_colour_and_a_count() -> None:
    text = shown([written(("Pa", "target"), ("ris", "draft")), event("finished", finish_reason="stop")], terminal=True)
    assert "\x1b[35mPa" in text
    assert "\x1b[32mris" in text
    assert "1/2" in text


def test_the_closing_table_says_what_speculation_paid_and_where_the_database_is() -> None:
    console = Console(file=io.StringIO(), width=100)
    numbers = {
        "completion_tokens": 1234,
        "tokens_per_s": 51.234,
        "mean_acceptance_length": 2.5,
        "speedup": 1.75,
        "speedup_source": "calibration",
    }
    console.print(closing_table(some_info(), numbers, "/data/basic.sqlite3"))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for expected in ("1,234", "51.2", "2.50", "1.75x", "calibration", "/data/basic.sqlite3"):
        assert expected in text


def test_the_closing_table_does_not_invent_a_speed_up() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table(some_info(), {}, None))
    assert isinstance(console.file, io.StringIO)
    assert "not measured" in console.file.getvalue()
