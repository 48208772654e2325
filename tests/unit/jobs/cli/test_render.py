from __future__ import annotations

import io
import re
import sys
import time
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from jobs.cli.render import (
    STYLES,
    Transcript,
    closing_table,
    jobs_table,
    keys_table,
    make_view,
    numerics_lines,
    status_table,
)
from jobs.client.progress_bar import progress_reporter
from jobs.client.results import JobCounts, JobInfo, JobProgress
from jobs.control_characters import safe
from jobs.messages import JobStatus, PartialEvent, Piece


def some_info(total: int = 2, completed: int = 2) -> JobInfo:
    return JobInfo(
        id="batch_1",
        status=JobStatus.COMPLETED,
        model="tiny",
        endpoint="/v1/chat/completions",
        created_at=0,
        request_counts=JobCounts(total=total, completed=completed),
        progress=JobProgress(),
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
def test_model_text_cannot_control_the_terminal(text: str, left: str) -> None:
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


def test_without_a_terminal_the_view_prints_plain_lines() -> None:
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


def test_texts_of_several_numerics_are_counted_by_name() -> None:
    assert list(numerics_lines({})) == []
    assert list(numerics_lines({"fp_1": 1200})) == ["Numerics: fp_1 (1,200)"]
    first, second = numerics_lines({"fp_1": 2, "fp_1,fp_2": 1})
    assert first == "Numerics: fp_1 (2), fp_1,fp_2 (1)"
    assert second.startswith("1 of these texts were resumed")


def test_the_closing_table_has_the_speed_up_and_the_database() -> None:
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


def test_the_closing_table_says_when_no_speed_up_was_measured() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table(some_info(), {}, None))
    assert isinstance(console.file, io.StringIO)
    assert "not measured" in console.file.getvalue()


def a_job(job_id: str, **changes: Any) -> JobInfo:
    large = {
        "id": job_id,
        "status": JobStatus.IN_PROGRESS,
        "model": "meta-llama/Llama-3.1-70B-Instruct",
        "created_at": 1_795_990_000,
        "expires_at": 1_796_076_400,
        "request_counts": JobCounts(total=50_000, completed=49_990, failed=3),
        "progress": JobProgress(
            completion_tokens=12_345_678, prompt_tokens=5, elapsed_s=95, tokens_per_s=60, time_left_s=95
        ),
        "metadata": {"team": "a\x1b[2J"},
    }
    return some_info().model_copy(update=large | changes)


def printed(renderable: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_list_of_jobs_fits_its_window_with_unique_id_prefixes(width: int) -> None:
    ids = [f"batch_{start}{'0' * (32 - len(start))}" for start in ("1", "2", "00000000001", "00000000002")]
    lines = printed(jobs_table([a_job(job_id) for job_id in ids], width, 1_795_990_090), width).splitlines()
    assert len(lines) == 1 + len(ids)
    assert max(map(len, lines)) <= width
    shown = [line.split()[0] for line in lines[1:]]
    assert len(set(shown)) == len(ids)
    assert all(job_id.startswith(name) for job_id, name in zip(ids, shown, strict=True))
    assert shown == ids or width == 80
    for line in lines[1:]:
        assert "in progress, 3 failed  49993/50000  12345678  1 min ago  met" in line


def test_a_narrow_list_of_jobs_is_readable_with_all_its_columns() -> None:
    table = printed(jobs_table([some_info().model_copy(update={"id": "batch_" + "1" * 32})], 80, 5.0), 80)
    assert table.splitlines()[1].split() == ["batch_11111111", "completed", "2/2", "0", "5", "s", "ago", "tiny"]


def test_the_status_table_has_times_in_the_local_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    text = printed(status_table(a_job("batch_1"), 1_795_990_090), 80)
    monkeypatch.undo()
    time.tzset()
    lines = dict(line.rstrip().split("  ", 1) for line in text.splitlines())
    assert {name.strip(): value.strip() for name, value in lines.items()} == {
        "job": "batch_1",
        "status": "in progress",
        "model": "meta-llama/Llama-3.1-70B-Instruct, /v1/chat/completions",
        "submitted": "2026-11-30 03:36:40 IST, 1 min ago",
        "requests": "49,990 completed, 3 failed, 50,000 in all",
        "tokens": "12,345,678 written, 5 read",
        "tokens/s": "60.0 over 1 min 35 s",
        "time left": "about 1 min 35 s",
        "expires": "2026-12-01 03:36:40 IST",
        "labels": "team=a",
    }


def test_a_job_that_has_ended_has_no_time_left() -> None:
    text = printed(status_table(a_job("batch_1", status=JobStatus.COMPLETED, retry_of="batch_0"), 1_795_990_090), 80)
    assert "left" not in text
    assert "expires" not in text
    assert "batch_0" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_progress_bar_shows_the_time_left_at_every_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("rich.console.Console", lambda stderr: console)
    with progress_reporter(True) as report:
        report(a_job("batch_1"))
    assert isinstance(console.file, io.StringIO)
    words = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]|\s+", " ", console.file.getvalue())
    assert "1 min 35 s left" in words
    assert "60.0 tokens/s" in words


@pytest.mark.parametrize("width", [80, 120])
def test_a_list_of_keys_shows_whole_ids_and_limits_in_words(width: int) -> None:
    key: dict[str, Any] = {
        "id": "key_" + "0" * 16,
        "name": "a-name-that-is-longer-than-a-column",
        "scopes": ["submit", "read"],
        "opens": True,
        "max_requests_queued": 1000,
        "max_tokens_queued": None,
        "requests_per_minute": 120,
        "kept_s": {"prompts": 86_400.0},
        "expires_at": 1_795_990_000,
        "revoked_at": None,
    }
    lines = printed(keys_table([key]), width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    assert key["id"] in words
    assert "_queued" not in words
    assert "1,000" in words
    assert "keeps prompts 1 d" in words
    assert re.search(r"works until .*2026-11-", words)


def test_in_a_notebook_one_line_changes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            shown.append(data["text/plain"])

    notebook = ModuleType("IPython.display")
    notebook.__dict__["display"] = lambda data, raw, display_id: Handle()
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    console = Console(stderr=True, force_jupyter=True)
    monkeypatch.setattr("rich.console.Console", lambda stderr: console)
    with progress_reporter(True) as report:
        for left_s in (95, 30):
            report(a_job("batch_1", progress=JobProgress(completion_tokens=9, tokens_per_s=60, time_left_s=left_s)))
    assert shown == [
        "49993/50000 requests · 9 tokens · 60.0 tokens/s · 3 failed · about 1 min 35 s left",
        "49993/50000 requests · 9 tokens · 60.0 tokens/s · 3 failed · about 30 s left",
    ]
    assert capsys.readouterr() == ("", "")
