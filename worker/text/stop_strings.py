"""Stop strings: a text ends before the first of them, and none of its beginning is ever shown.

Works on decoded text, so that a stop string is found across the borders of tokens, pieces and steps.
"""

from __future__ import annotations

from collections.abc import Sequence

Pieces = list[tuple[str, str]]  # (text, "draft" | "target"), neighbours of different sources


class StopStrings:
    """Passes one text on up to its first stop string, and holds back what may turn out to be the beginning of one.

    First is the one that is complete first; of two complete at once, the longer. So the text does not depend on how it
    was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for `stops`; without any, all text passes at once."""
        self._stops = tuple(stops)
        self._held: Pieces = []
        self.hit = False

    def push(self, chunk: str, source: str) -> Pieces:
        """Add text; return what may be shown of it and of what was held back."""
        if self.hit:
            return []
        add_piece(self._held, chunk, source)
        text = "".join(part for part, _ in self._held)
        start = self._first(text)
        if start is not None:
            self.hit = True
            return self._pass(start)
        return self._pass(len(text) - self._beginning(text))

    def end(self) -> Pieces:
        """Return what was held back, as no text follows: it was no stop string."""
        return [] if self.hit else self._pass(sum(len(part) for part, _ in self._held))

    def _first(self, text: str) -> int | None:
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` with which a stop string begins."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def _pass(self, chars: int) -> Pieces:
        passed: Pieces = []
        kept: Pieces = []
        for text, source in self._held:
            if text[:chars]:
                passed.append((text[:chars], source))
            if text[chars:]:
                kept.append((text[chars:], source))
            chars = max(0, chars - len(text))
        self._held = kept
        return passed


def add_piece(pieces: Pieces, chunk: str, source: str) -> None:
    """Append a chunk, joined to the last piece if that has the same source."""
    if pieces and pieces[-1][1] == source:
        pieces[-1] = (pieces[-1][0] + chunk, source)
    else:
        pieces.append((chunk, source))
