"""Read an answer's text into content and tool calls, as it arrives.

The same pieces of a text in any order of arrival give the same content, names and arguments. Text that begins as a call
and is none stays content. A call that is cut keeps the arguments so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jobs.openai.call_formats import CallFormat

_NAME = re.compile(r"[a-zA-Z0-9_-]*")
_MAX_NAME_CHARS = 64
_JSON_PART = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True, slots=True)
class CallDelta:
    """New text of a call: its name, once, and then pieces of its arguments."""

    index: int
    name: str | None
    arguments: str


Piece = str | CallDelta  # content, or a part of a call


class CallParser:
    """Incremental parser of one answer."""

    def __init__(self, form: CallFormat) -> None:
        """Read calls in the form of a family."""
        self.num_calls = 0
        self.open_call = False  # the arguments of the last call are incomplete
        self._form = form
        self._held = ""  # text that is not assigned yet
        self._name_at = 0  # where the name begins in the held text
        self._wrote = False  # content beside white space
        self._arguments = _JsonObject()
        self._step: Callable[[], list[Piece] | None] = self._read_content

    def push(self, text: str) -> list[Piece]:
        """Add text; return what is certain now."""
        self._held += text
        pieces: list[Piece] = []
        while (read := self._step()) is not None:
            pieces += read
        return pieces

    def finish(self) -> list[Piece]:
        """Return the content that was held back: the text has ended."""
        held, self._held = self._held, ""
        begun = self.num_calls and self._step != self._read_content
        return [] if begun or not held or (self.num_calls and held.isspace()) else [held]

    def _read_content(self) -> list[Piece] | None:
        """Read up to the next call. Hold back white space and what may begin a call."""
        start = self._call_start()
        if start is not None:
            self._name_at = start + len(self._form.first)
            self._step = self._read_name
            end = len(self._held[:start].rstrip())
            opening = self._form.opening
            if opening and self._held[:end].endswith(opening):
                end = len(self._held[:end].removesuffix(opening).rstrip())
        else:
            end = len(self._held[: len(self._held) - self._possible_start_length()].rstrip())
            if not end:
                return None
        content, self._held = self._held[:end], self._held[end:]
        self._name_at -= end
        self._wrote |= bool(content)
        return [content] if content else []

    def _call_start(self) -> int | None:
        """Return where a call begins in the held text."""
        start = self._held.find(self._form.first)
        if start < 0 or (self._form.at_start and not self._is_opening(self._held[:start])):
            return None
        return start

    def _is_opening(self, text: str) -> bool:
        """Return whether nothing but white space and the opening is before a call."""
        return not self._wrote and text.strip() in ("", self._form.opening)

    def _possible_start_length(self) -> int:
        """Return the length of the end of the held text that may begin a call."""
        first, opening = self._form.first, self._form.opening
        if not self._form.at_start:
            return _overlap(self._held, first)
        text = self._held.strip()
        rest = text.removeprefix(opening).lstrip()
        possible = not self._wrote and (first.startswith(rest) or opening.startswith(text))
        return len(self._held) if possible else 0

    def _read_name(self) -> list[Piece] | None:
        """Read a name and the text up to the arguments. If they are not a call's, the text is content."""
        found = _NAME.match(self._held, self._name_at)
        assert found is not None
        name, rest, wanted = found[0], self._held[found.end() :], self._form.arguments + "{"
        if len(name) > _MAX_NAME_CHARS or (rest and (not name or not _agree(rest, wanted))):
            return self._give_up()
        if len(rest) < len(wanted):
            return None
        self._held = rest[len(wanted) - 1 :]
        self._arguments = _JsonObject()
        self.num_calls += 1
        self.open_call = True
        self._step = self._read_arguments
        return [CallDelta(self.num_calls - 1, name, "")]

    def _give_up(self) -> list[Piece]:
        """Take the start of what is no call as content, and search on behind it."""
        end = len(self._held) - len(self._held.lstrip()) + 1
        content, self._held = self._held[:end], self._held[end:]
        self._wrote = True
        self._step = self._read_content
        return [content]

    def _read_arguments(self) -> list[Piece] | None:
        if not self._held:
            return None
        end = self._arguments.end(self._held)
        text, self._held = self._held[:end], self._held[end:]
        if self._arguments.complete:
            self.open_call = False
            self._step = self._read_after
        return [CallDelta(self.num_calls - 1, None, text)]

    def _read_after(self) -> list[Piece] | None:
        after = self._form.after
        if len(self._held) < len(after) and after.startswith(self._held):
            return None
        self._held = self._held.removeprefix(after)
        self._step = self._read_next
        return []

    def _read_next(self) -> list[Piece] | None:
        """Read what leads to the next call, or what ends the last one."""
        following, last = self._form.next, self._form.last
        if following is not None and self._held.startswith(following):
            self._name_at = len(following)
            self._step = self._read_name
        elif last and self._held.startswith(last):
            self._held = self._held.removeprefix(last)
            self._step = self._read_content
        elif any(text and text.startswith(self._held) for text in (following, last)):
            return None
        else:
            self._step = self._read_content
        return []


class _JsonObject:
    """Finds the end of a JSON object in a text that arrives in pieces."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the next character belongs to an escape

    def end(self, text: str) -> int:
        """Return where the object ends in the next piece of text, or its length."""
        at = int(self._escaped)
        self._escaped = False
        for found in self._parts(text, at):
            part = found[0]
            if part == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if part in "{[" else -1
                if self._depth <= 0:
                    self.complete = True
                    return found.end()
        return len(text)

    def _parts(self, text: str, at: int) -> Iterator[re.Match[str]]:
        """Yield quotes and brackets; skip escaped characters."""
        while (found := _JSON_PART.search(text, at)) is not None:
            at = found.end()
            if found[0] != "\\":
                yield found
            elif self._in_string:
                self._escaped = at == len(text)
                at += 1


def _agree(text: str, wanted: str) -> bool:
    """Return whether one of two texts begins with the other."""
    return text.startswith(wanted) or wanted.startswith(text)


def _overlap(text: str, start: str) -> int:
    """Return the length of the longest end of `text` that begins `start`."""
    longest = min(len(start) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if start.startswith(text[-n:])), 0)
