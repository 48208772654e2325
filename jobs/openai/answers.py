"""Split the raw text of a choice into the parts of an answer: its reasoning, its content and its tool calls.

One incremental parser for whole answers and streams: the parts are the same however the text is cut. Pure text, because
the same text is read from rows, from events and by clients.

Line breaks beside a marker belong to it, as chat templates write and strip them. All other text stays as it is. A text
that only resembles a marker is text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from jobs.messages import AnswerFormat, ReasoningFormat
from jobs.openai.call_formats import call_format
from jobs.openai.call_parser import CallDelta, CallParser, Piece

STOP: Final = "stop"  # the finish reason of a text that ended by itself, or with a stop string

_BREAKS: Final = "\r\n"


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What a piece of text adds to the parts of an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        """Return whether it adds anything."""
        return bool(self.reasoning or self.content or self.calls)


@dataclass(frozen=True, slots=True)
class Answer:
    """The parts of a whole text."""

    reasoning: str | None  # None: the text has none, or it is left out
    content: str | None  # None: the text has nothing but reasoning or calls
    calls: tuple[tuple[str, str], ...] = ()  # the name and the arguments of each
    stop_reason: str = STOP  # its finish reason if its text has not been cut


class AnswerParser:
    """Splits one text that arrives in pieces."""

    def __init__(self, form: AnswerFormat | None) -> None:
        """Start before the first character of the text. Without a format, all text is content."""
        reasoning, calls = (None, None) if form is None else (form.reasoning, form.calls)
        self._reasoning = ReasoningSplitter(reasoning) if reasoning is not None and reasoning.separate else None
        self._included = reasoning is None or reasoning.included
        self._calls = None if calls is None else CallParser(call_format(calls.form))  # KeyError: of a newer version
        self._named = calls is not None and calls.named

    def push(self, text: str) -> AnswerDelta:
        """Add text; return what is now certain to belong to a part."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text)
        return self._delta(reasoning, [content] if self._calls is None else self._calls.push(content))

    def finish(self) -> AnswerDelta:
        """Return the rest: the text has ended."""
        reasoning, content = ("", "") if self._reasoning is None else self._reasoning.finish()
        pieces: list[Piece] = [content]
        if self._calls is not None:
            pieces = [*self._calls.push(content), *self._calls.finish()]
        return self._delta(reasoning, pieces)

    @property
    def stop_reason(self) -> str:
        """The finish reason if the text has ended without being cut: `tool_calls` after a call.

        It is `stop` if the request named the function, as OpenAI answers.
        """
        called = self._calls is not None and self._calls.num_calls > 0 and not self._calls.open_call
        return "tool_calls" if called and not self._named else STOP

    def _delta(self, reasoning: str, pieces: Sequence[Piece]) -> AnswerDelta:
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = tuple(piece for piece in pieces if not isinstance(piece, str))
        return AnswerDelta(reasoning if self._included else "", content, calls)


def split_answer(form: AnswerFormat | None, text: str) -> Answer:
    """Return the parts of a whole text."""
    parser = AnswerParser(form)
    deltas = (parser.push(text), parser.finish())
    content = "".join(delta.content for delta in deltas)
    return Answer(
        reasoning="".join(delta.reasoning for delta in deltas) or None,
        content=content or (None if form is not None and text else ""),
        calls=_joined(call for delta in deltas for call in delta.calls),
        stop_reason=parser.stop_reason,
    )


def _joined(deltas: Iterable[CallDelta]) -> tuple[tuple[str, str], ...]:
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        if delta.name is not None:
            calls.append((delta.name, ""))
        name, arguments = calls[delta.index]
        calls[delta.index] = (name, arguments + delta.arguments)
    return tuple(calls)


class _NextPart(Enum):
    """The part of the text that comes next."""

    START = auto()  # a start marker may follow
    REASONING_START = auto()  # line breaks after the start
    REASONING = auto()
    CONTENT_START = auto()  # line breaks after the end marker
    CONTENT = auto()


class ReasoningSplitter:
    """Splits a text into reasoning and content at the markers of a format.

    The reasoning starts at the start of the text: with the start marker, or without it if the prompt has opened it. It
    ends with the first end marker; what follows is content, further markers included. Each character is read once.
    """

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._state = _NextPart.START
        self._breaks: list[str] = []  # line breaks that may belong to a marker
        self._held = ""  # text after them that may be a part of a marker
        self.found = form.opened  # the text has reasoning, possibly empty

    @property
    def open(self) -> bool:
        """True until the reasoning has ended, or cannot begin any more."""
        return self._state in (_NextPart.START, _NextPart.REASONING_START, _NextPart.REASONING)

    def push(self, text: str) -> tuple[str, str]:
        """Add text; return the new (reasoning, content)."""
        self._held += text
        content = self._start() if self._state is _NextPart.START else ""
        reasoning = self._take_reasoning() if self._state in (_NextPart.REASONING_START, _NextPart.REASONING) else ""
        return reasoning, content if self.open else content + self._take_content()

    def finish(self) -> tuple[str, str]:
        """Return what was held back, as (reasoning, content)."""
        held, self._held = self._held, ""
        if not self.found:
            return "", self._taken_breaks() + held
        if not self.open:
            return "", ""
        return (self._taken_breaks() if self._state is _NextPart.REASONING else "") + held, ""

    def _start(self) -> str:
        """Decide whether the text starts with the start marker, once enough of it is there; return what is content."""
        bare = self._held.lstrip(_BREAKS)
        self._breaks.append(self._held[: len(self._held) - len(bare)])
        self._held = bare
        if bare.startswith(self._form.start):
            self.found = True
            self._held = bare.removeprefix(self._form.start)
        elif self._form.start.startswith(bare):
            return ""
        elif not self._form.opened:
            self._state = _NextPart.CONTENT
            return self._taken_breaks()
        self._breaks.clear()
        self._state = _NextPart.REASONING_START
        return ""

    def _take_reasoning(self) -> str:
        if self._state is _NextPart.REASONING_START:
            self._held = self._held.lstrip(_BREAKS)
            if not self._held:
                return ""
            self._state = _NextPart.REASONING
        text, marker, rest = self._held.partition(self._form.end)
        if marker:
            self._state = _NextPart.CONTENT_START
        else:
            certain = len(text) - _partial_match_length(text, self._form.end)
            text, rest = text[:certain], text[certain:]
        self._held = rest
        taken = text.rstrip(_BREAKS)
        before = self._taken_breaks() if taken else ""
        self._breaks.append(text[len(taken) :])
        return before + taken

    def _take_content(self) -> str:
        if self._state is _NextPart.CONTENT_START:
            self._held = self._held.lstrip(_BREAKS)
            if not self._held:
                return ""
            self._state = _NextPart.CONTENT
        text, self._held = self._held, ""
        return text

    def _taken_breaks(self) -> str:
        breaks = "".join(self._breaks)
        self._breaks.clear()
        return breaks


def _partial_match_length(text: str, marker: str) -> int:
    """Return the length of the longest suffix of the text that is a proper prefix of the marker."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
