"""Durations and times as users read and write them."""

from __future__ import annotations

import pytest

from jobs.client.durations import age_text, duration_text, parse_duration_s


@pytest.mark.parametrize(("text", "seconds"), [("30m", 1_800), ("24h", 86_400), ("1d", 86_400), ("99999m", 5_999_940)])
def test_a_duration_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "d", "-1d", "1.5h", "1 d", "01d", "0d", "1s", "1D", "100000m", "1d\n", "١d"]
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="followed by m, h or d"):
        parse_duration_s(text)


def test_zero_and_the_number_of_digits_are_options() -> None:
    assert parse_duration_s("0d", zero=True) == 0
    with pytest.raises(ValueError, match="up to 4 digits"):
        parse_duration_s("10000h", max_digits=4)


def test_durations_and_ages_are_rounded_to_what_people_say() -> None:
    assert [duration_text(seconds) for seconds in (0.4, 59, 61, 7_260)] == ["0 s", "59 s", "1 min 1 s", "2 h 1 min"]
    assert [age_text(1_000, now) for now in (990, 1_005, 1_130, 8_300, 200_000)] == [
        "0 s ago",
        "5 s ago",
        "2 min ago",
        "2 h ago",
        "2 d ago",
    ]
