"""Stop strings: the text ends at the first one for any split into pieces, and no part of one is returned."""

from __future__ import annotations

import pytest

from worker.text.stop_strings import StopStrings

TEXT = "one two, three; 日本語 🙂 four"


def passed(stops: list[str], chunks: list[str]) -> tuple[str, bool]:
    guard = StopStrings(stops)
    shown = "".join(text for chunk in chunks for text, _ in guard.push(chunk, "target"))
    return shown + "".join(text for text, _ in guard.end()), guard.hit


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["three"], "one two, "),
        (["two", "one"], ""),
        (["語 🙂"], "one two, three; 日本"),
        (["four"], TEXT[:-4]),
        (["wo, three", "w"], "one t"),  # the one that is complete first
        (["o, t", "wo, t"], "one t"),  # of two complete at once the longer
        (["never", "four!"], TEXT),
        ([], TEXT),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(stops: list[str], expected: str, size: int) -> None:
    chunks = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    assert passed(stops, chunks) == (expected, expected != TEXT)


def test_what_may_be_a_stop_string_is_held_back_and_released_when_it_is_not() -> None:
    guard = StopStrings(["aab"])
    assert guard.push("xa", "draft") == [("x", "draft")]
    assert guard.push("a", "target") == []
    assert guard.push("a", "target") == [("a", "draft")]  # of xaaa, aa may still begin a stop string
    assert guard.push("c", "draft") == [("aa", "target"), ("c", "draft")]
    assert not guard.hit


def test_pieces_keep_their_sources_across_a_stop_string() -> None:
    guard = StopStrings(["cd"])
    assert guard.push("ab", "draft") + guard.push("c", "draft") == [("ab", "draft")]
    assert guard.push("d", "target") == []
    assert guard.hit
    assert guard.push("more", "target") == guard.end() == []


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_a_kept_stop_string_ends_the_text(size: int) -> None:
    guard = StopStrings(["three", "four"], keep=True)
    chunks = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    shown = "".join(text for chunk in chunks for text, _ in guard.push(chunk, "target"))
    assert (shown, guard.hit, guard.end()) == ("one two, three", True, [])


@pytest.mark.parametrize(
    ("safe", "stops", "expected"),
    [
        ("one two, thre", ["two", "three"], "one two, "),  # it ends after the safe text
        ("one two, three", ["two", "three", "four"], TEXT[:-4]),
        ("one tw", ["tw", "o, three"], "one tw"),
        ("one t", ["ee; ", "two"], "one "),
        ("one two, three;", ["three;"], TEXT),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_string_that_ends_too_early_is_text(safe: str, stops: list[str], expected: str, size: int) -> None:
    guard = StopStrings(stops)
    rest = TEXT[len(safe) :]
    shown = [text for letter in safe for text, _ in guard.push(letter, "target", may_stop=False)]
    for i in range(0, len(rest), size):
        shown += [text for text, _ in guard.push(rest[i : i + size], "target")]
    shown += [text for text, _ in guard.end()]
    assert ("".join(shown), guard.hit) == (expected, expected != TEXT)
