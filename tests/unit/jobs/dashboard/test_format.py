"""Formatting for pages: escaped texts, tokens, durations."""

from __future__ import annotations

import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from jobs.api.server import serve
from jobs.dashboard import charts, format
from jobs.dashboard import html as texts
from jobs.errors import SetupError
from jobs.reports.plots import PLOTS
from jobs.reports.speedup import check_text
from jobs.settings import JobsSettings
from storage import schema
from storage.queries import JobView
from storage.statistics import Minute, SpeedupCheckStats


def test_model_text_is_escaped_on_the_page() -> None:
    pieces = [("<script>alert(1)</script>", "draft"), ('\x1b[31m"red"\x1b[0m\u202e', "target"), ("x", "</span>")]
    html = texts.colored(pieces)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert 'class="by-draft"' in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert html.count("<span") == html.count("</span>") == 3


@pytest.mark.parametrize(
    ("token", "label"),
    [(" the", "␣the"), ("\n", "⏎"), ("", "∅"), ("\x1b[2J", "∅"), ("abcdefghijklmnop", "abcdefghijklm…")],
)
def test_tokens_are_shown_with_visible_white_space(token: str, label: str) -> None:
    assert texts.token(token) == label


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3_700, "1 h 1 min"), (90_000, "1 d 1 h")]
)
def test_durations_have_at_most_two_units(seconds: float, text: str) -> None:
    assert format.span(seconds) == text


def job(**fields: object) -> JobView:
    values = (
        dict.fromkeys(JobView.__dataclass_fields__, 0)
        | dict.fromkeys(("finished_at", "paused_at"))
        | {"started_at": time.time() - 100}
    )
    return JobView(**values | {"requests_total": 40, "requests_completed": 10} | fields)  # type: ignore[arg-type]


def test_time_left_is_estimated_for_the_open_requests() -> None:
    assert format.left(job()) == "about 5 min left"
    assert format.left(job(requests_completed=0)) == "1 min 40 s so far"
    assert format.left(job(started_at=None)) == "waiting"
    assert format.left(job(started_at=100.0, finished_at=160.0)) == "took 1 min"
    assert format.left(job(started_at=100.0, paused_at=160.0)) == "1 min so far", "a paused job comes no nearer its end"


def test_a_database_of_an_older_version_stops_the_api_server_with_a_sentence(settings: JobsSettings) -> None:
    schema.upgrade(settings.resolved_database_url, "0002")
    with pytest.raises(SetupError, match=r"revision 0002.*basic db upgrade"):
        serve(settings)


def minutes(*found: tuple[int, int, float]) -> list[Minute]:
    return [Minute(60 * minute, tokens, busy_s, None, None) for minute, tokens, busy_s in found]


def points_of(found: list[Minute]) -> list[list[float]]:
    stats: Any = SimpleNamespace(minutes=found)
    return charts._points(stats)


def test_minutes_in_which_nothing_was_written_have_no_throughput() -> None:
    assert points_of(minutes((100, 60, 60.0), (103, 120, 60.0))) == [
        [6_000_000, 1.0],
        [6_060_000, 0.0],
        [6_120_000, 0.0],
        [6_180_000, 2.0],
        [6_240_000, 2.0],  # intervals of equal length
    ]
    assert points_of([]) == []


def test_a_job_of_four_seconds_is_as_fast_in_the_picture_as_in_the_numbers() -> None:
    from matplotlib.figure import Figure  # half a second

    assert [rate for _, rate in points_of(minutes((100, 981, 4.0)))] == [245.25, 245.25]
    assert [rate for _, rate in points_of(minutes((100, 20, 0.1)))] == [200.0, 200.0]
    figure = Figure()
    axes = figure.add_subplot()
    PLOTS["throughput"](axes, {"minutes": [{"minute": 6_000, "tokens": 981, "busy_s": 4.0}]})
    assert numpy.asarray(axes.lines[0].get_ydata()).tolist() == [245.25, 245.25]
    PLOTS["throughput"](axes, {"minutes": [{"minute": 6_000, "tokens": 981}]})  # an older service
    assert numpy.asarray(axes.lines[1].get_ydata()).tolist() == [16.35, 16.35]


def test_a_short_part_of_a_minute_makes_no_peak() -> None:
    points = points_of(minutes((100, 6_000, 60.0), (101, 40, 0.01), (103, 30, 0.0), (105, 30, 0.5)))
    assert [rate for _, rate in points] == pytest.approx([100, 6_040 / 60.01, 0, 0.5, 0, 60, 60], abs=1e-3)


def test_a_month_of_minutes_keeps_all_its_tokens_in_few_points() -> None:
    points = points_of(minutes(*((minute, 60, 60.0) for minute in range(0, 43_200, 7))))
    assert len(points) <= 301
    assert [rate for _, rate in points] == [1.0] * len(points)


@pytest.mark.parametrize(
    ("done", "requests", "faults", "text"),
    [
        (False, 0, 0, "20 requests wait for an idle worker"),
        (True, 0, 0, "no request was decoded with and without drafts"),
        (True, 20, 0, "20 requests decoded with and without drafts, the same texts, 4.0 at a time"),
        (True, 20, 1, "1 of 20 texts differ, which is a fault, 4.0 at a time"),
    ],
)
def test_a_comparison_says_what_it_is_worth(done: bool, requests: int, faults: int, text: str) -> None:
    fields = asdict(SpeedupCheckStats(20, requests, done, 1.2, 0.1, 4.0, faults))
    del fields["speedup"], fields["speedup_error"]
    assert check_text(**fields) == text


def test_a_comparison_that_was_given_up_says_why() -> None:
    fields = asdict(SpeedupCheckStats(20, 0, True, None, None, None, 0, "poison", "The worker process died twice."))
    del fields["speedup"], fields["speedup_error"]
    assert check_text(**fields) == "given up, poison: The worker process died twice."
