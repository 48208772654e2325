"""Stop strings: end a text before the first of them, and never return a part of one.

Works on decoded text, so that stop strings are found across the borders of tokens, pieces and steps.
"""

from __future__ import annotations

from collections.abc import Sequence

Pieces = list[tuple[str, str]]  # (text, "draft" | "target"); adjacent pieces differ in source


class StopStrings:
    """Return a text up to its first stop string, and hold back what may be the start of one.

    The first stop string is the one that is complete first; of two that end together, the longer. So the result does
    not depend on the tokens of the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Search for `stops`; without any, all text is returned at once."""
        self._stops = tuple(stops)
        self._pending: Pieces = []
        self.hit = False

    def push(self, chunk: str, source: str) -> Pieces:
        """Add text; return what is now certain to be before a stop string."""
        if self.hit:
            return []
        add_piece(self._pending, chunk, source)
        text = "".join(part for part, _ in self._pending)
        start = self._find(text)
        if start is not None:
            self.hit = True
            return self._release(start)
        return self._release(len(text) - self._partial_match_length(text))

    def end(self) -> Pieces:
        """Return the text that was held back: the text has ended without a stop string."""
        return [] if self.hit else self._release(sum(len(part) for part, _ in self._pending))

    def _find(self, text: str) -> int | None:
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def _release(self, chars: int) -> Pieces:
        released: Pieces = []
        pending: Pieces = []
        for text, source in self._pending:
            if text[:chars]:
                released.append((text[:chars], source))
            if text[chars:]:
                pending.append((text[chars:], source))
            chars = max(0, chars - len(text))
        self._pending = pending
        return released


def add_piece(pieces: Pieces, chunk: str, source: str) -> None:
    """Append a chunk; extend the last piece if the source is the same."""
    if pieces and pieces[-1][1] == source:
        pieces[-1] = (pieces[-1][0] + chunk, source)
    else:
        pieces.append((chunk, source))
