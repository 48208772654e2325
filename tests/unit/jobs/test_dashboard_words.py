"""What pages write: texts of strangers, tokens, spans of time."""

from __future__ import annotations

import time

import pytest

from jobs.api.server import serve
from jobs.dashboard import charts, texts, words
from jobs.errors import SetupError
from jobs.settings import JobsSettings
from storage import schema
from storage.queries import JobView
from storage.statistics import PlainComparison


def test_model_text_does_nothing_on_the_page() -> None:
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
def test_tokens_can_be_seen(token: str, label: str) -> None:
    assert texts.token(token) == label


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3_700, "1 h 1 min"), (90_000, "1 d 1 h")]
)
def test_spans_have_two_units_at_most(seconds: float, text: str) -> None:
    assert words.span(seconds) == text


def job(**fields: object) -> JobView:
    values = dict.fromkeys(JobView.__dataclass_fields__, 0) | {"started_at": time.time() - 100, "finished_at": None}
    return JobView(**values | {"requests_total": 40, "requests_completed": 10} | fields)  # type: ignore[arg-type]


def test_time_left_is_that_of_the_requests_that_are_left() -> None:
    assert words.left(job()) == "about 5 min left"
    assert words.left(job(requests_completed=0)) == "1 min 40 s so far"
    assert words.left(job(started_at=None)) == "waiting"
    assert words.left(job(started_at=100.0, finished_at=160.0)) == "took 1 min"


def test_a_database_of_an_older_version_stops_the_shim_with_a_sentence(settings: JobsSettings) -> None:
    schema.upgrade(settings.resolved_database_url, "0002")
    with pytest.raises(SetupError, match=r"revision 0002.*basic db upgrade"):
        serve(settings)


def test_minutes_in_which_nothing_was_written_have_no_throughput() -> None:
    assert charts._rates({100: 60, 103: 120}) == [
        [6_000_000, 1.0],
        [6_060_000, 0.0],
        [6_120_000, 0.0],
        [6_180_000, 2.0],
        [6_240_000, 2.0],  # a minute is as long as the others
    ]
    assert charts._rates({}) == []


def test_a_month_of_minutes_keeps_all_its_tokens_in_few_points() -> None:
    points = charts._rates(dict.fromkeys(range(0, 43_200, 7), 60))
    assert len(points) <= 301
    minutes = (points[1][0] - points[0][0]) / 60_000
    assert sum(rate for _, rate in points[:-1]) * minutes * 60 == pytest.approx(60 * len(range(0, 43_200, 7)), rel=0.02)


@pytest.mark.parametrize(
    ("done", "requests", "faults", "text"),
    [
        (False, 0, 0, "20 requests wait for an idle worker"),
        (True, 0, 0, "no request was decoded both ways"),
        (True, 20, 0, "20 requests decoded both ways, the same texts"),
        (True, 20, 1, "1 of 20 texts differ: a fault"),
    ],
)
def test_a_comparison_says_what_it_is_worth(done: bool, requests: int, faults: int, text: str) -> None:
    comparison = PlainComparison(20, requests, done, 1.2, 0.1, 4.0, faults)
    assert words.compared(comparison) == text


def test_a_comparison_that_was_given_up_says_why() -> None:
    comparison = PlainComparison(20, 0, True, None, None, None, 0, "poison", "The worker process died twice.")
    assert words.compared(comparison) == "given up, poison: The worker process died twice."
