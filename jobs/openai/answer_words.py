"""Split a text into the parts of an answer word by word: the parts and their order depend on the text alone.

`AnswerParser` gives the same parts however a text is cut, but not the same deltas. Here texts are cut in one way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from jobs.messages import AnswerFormat
from jobs.openai.answers import AnswerDelta, AnswerParser, split_answer

_MAX_CHARS: Final = 16  # of the white space before a word, and of the word
_WORD: Final = re.compile(rf"\s{{0,{_MAX_CHARS}}}(\S{{0,{_MAX_CHARS}}})")


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """Reasoning, content, or a call of a function, with its index among the calls."""

    text: str  # of a call: its arguments
    is_reasoning: bool = False
    call: int | None = None
    name: str = ""  # of the function


class WordParser:
    """Splits a text that arrives in pieces as `AnswerParser` does, but word by word."""

    def __init__(self, form: AnswerFormat | None) -> None:
        """Start before the first character of the text."""
        self._parser = AnswerParser(form)
        self._held = ""  # the end of the text, whose last word may not be complete

    def push(self, text: str) -> list[AnswerDelta]:
        """Add text; return the deltas of the words that are complete."""
        self._held += text
        deltas = []
        while self._held:
            found = _WORD.match(self._held)
            assert found is not None
            if found.end() == len(self._held) and len(found[1]) < _MAX_CHARS:
                break
            self._held = self._held[found.end() :]
            deltas.append(self._parser.push(found[0]))
        return deltas

    def finish(self) -> list[AnswerDelta]:
        """Return the deltas of the rest: the text has ended."""
        return [self._parser.push(self._held), self._parser.finish()]


def delta_parts(delta: AnswerDelta) -> list[AnswerPart]:
    """Return what a delta adds, in order. A call begins with its name, and without arguments."""
    parts = [AnswerPart(delta.reasoning, is_reasoning=True)] if delta.reasoning else []
    parts += [AnswerPart(delta.content)] if delta.content else []
    return parts + [AnswerPart(call.arguments, call=call.index, name=call.name or "") for call in delta.calls]


def answer_parts(form: AnswerFormat | None, text: str) -> list[AnswerPart]:
    """Return the parts of a whole text, in order; the content is None or empty as `split_answer` says."""
    if form is None or form.calls is None:  # the order is known: the text need not be cut
        answer = split_answer(form, text)
        parts = [] if answer.reasoning is None else [AnswerPart(answer.reasoning, is_reasoning=True)]
        return parts if answer.content is None else [*parts, AnswerPart(answer.content)]
    parser = WordParser(form)
    joined: list[AnswerPart] = []
    for delta in (*parser.push(text), *parser.finish()):
        for part in delta_parts(delta):
            if joined and continues(joined[-1], part):
                joined[-1] = replace(joined[-1], text=joined[-1].text + part.text)
            else:
                joined.append(part)
    return joined if joined or text else [AnswerPart("")]


def continues(part: AnswerPart, new: AnswerPart) -> bool:
    """Return whether new text belongs to a part."""
    return (part.is_reasoning, part.call) == (new.is_reasoning, new.call)
