"""Stop strings: end a text at the first of them, and never return a part of one that the text must not hold.

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

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        """Search for `stops`; without any, all text is returned at once. `keep` ends the text after a stop string."""
        self._stops = tuple(stops)
        self._keep = keep
        self._pending: Pieces = []
        self._safe = 0  # first characters of the pending text, within which no stop string ends
        self.hit = False

    def push(self, chunk: str, source: str, *, may_stop: bool = True) -> Pieces:
        """Add text; return what is certain to stay. A stop string that ends within it counts only with `may_stop`."""
        if self.hit:
            return []
        add_piece(self._pending, chunk, source)
        text = "".join(part for part, _ in self._pending)
        if not may_stop:
            self._safe = len(text)
        found = self._find(text)
        if found is not None:
            self.hit = True
            return self._release(found[1 if self._keep else 0])
        return self._release(len(text) - self._partial_match_length(text))

    def end(self) -> Pieces:
        """Return the text that was held back: the text has ended without a stop string."""
        return [] if self.hit else self._release(sum(len(part) for part, _ in self._pending))

    def _find(self, text: str) -> tuple[int, int] | None:
        """Return start and end of the first stop string that ends after the safe characters."""
        starts = [(text.find(stop, max(0, self._safe - len(stop) + 1)), stop) for stop in self._stops]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        return min(found)[::-1] if found else None

    def _partial_match_length(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0)

    def _release(self, chars: int) -> Pieces:
        released: Pieces = []
        pending: Pieces = []
        self._safe = max(0, self._safe - chars)
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
