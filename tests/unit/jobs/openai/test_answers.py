"""Answers: the parts of a text are the same however it is cut, and only markers are removed."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.messages import AnswerFormat, ReasoningFormat
from jobs.openai.answers import Answer, AnswerParser, split_answer


def marked(*, opened: bool = False, included: bool = True) -> AnswerFormat:
    return AnswerFormat(reasoning=ReasoningFormat(start="<think>", end="</think>", opened=opened, included=included))


WRITES = marked()  # the model writes the start marker itself
OPENED = marked(opened=True)  # the prompt ends with it


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        (OPENED, "I add.\n</think>\n\n4", Answer("I add.", "4")),
        (OPENED, "\nI add.</think>4", Answer("I add.", "4")),
        (OPENED, "<think>\nI add.\n</think>\n\n4", Answer("I add.", "4")),
        (OPENED, "I add", Answer("I add", None)),
        (OPENED, "I add.\n</thi", Answer("I add.\n</thi", None)),
        (OPENED, "</think>\n\n4", Answer(None, "4")),
        (OPENED, "\n", Answer(None, None)),
        (OPENED, "", Answer(None, "")),
        (WRITES, "<think>\nI add.\n</think>\n\n4", Answer("I add.", "4")),
        (WRITES, "\n<think>I add.</think>\n", Answer("I add.", None)),
        (WRITES, "<think>\n\n</think>\n\n4", Answer(None, "4")),
        (WRITES, "4, said <think> no one </think>\n", Answer(None, "4, said <think> no one </think>\n")),
        (WRITES, "\n4\n", Answer(None, "\n4\n")),
        (WRITES, "<thin", Answer(None, "<thin")),
        (WRITES, "<thinking>", Answer(None, "<thinking>")),
        (WRITES, "<think>", Answer(None, None)),
        (OPENED, "a </think > b </thinks> c</think>d</think>e", Answer("a </think > b </thinks> c", "d</think>e")),
        (OPENED, "a\n\nb\n</think>\n  indented", Answer("a\n\nb", "  indented")),
        (None, "<think>I add.</think>4", Answer(None, "<think>I add.</think>4")),
        (None, "", Answer(None, "")),
        (marked(opened=True, included=False), "I add.\n</think>\n\n4", Answer(None, "4")),
        (marked(opened=True, included=False), "I add.", Answer(None, None)),
    ],
)
def test_only_markers_and_the_line_breaks_beside_them_are_removed(
    form: AnswerFormat | None, text: str, answer: Answer
) -> None:
    assert split_answer(form, text) == answer


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "</thi", "nk>", "\n", "\r\n", " ", "a", "é", "think>"]),
        max_size=10,
    ).map("".join),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    form=st.sampled_from([WRITES, OPENED, None]),
)
def test_any_cut_of_a_text_gives_the_same_parts(text: str, cuts: list[int], form: AnswerFormat | None) -> None:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    parser = AnswerParser(form)
    deltas = [parser.push(text[a:b]) for a, b in pairwise(places)] + [parser.finish()]
    whole = split_answer(form, text)

    assert "".join(delta.reasoning for delta in deltas) == (whole.reasoning or "")
    assert "".join(delta.content for delta in deltas) == (whole.content or "")


def test_text_is_returned_as_soon_as_it_is_certain() -> None:
    parser = AnswerParser(OPENED)
    assert parser.push("I add <").reasoning == "I add "
    assert parser.push("b").reasoning == "<b"
    assert not parser.push("\n</think")
    assert not parser.push(">\n")
    assert parser.push("\n4").content == "4"
    assert parser.push("\n").content == "\n"
    assert not parser.finish()
