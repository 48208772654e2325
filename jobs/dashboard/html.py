"""Text of strangers as HTML that shows it and does nothing else: models write what they like.

Pure: strings in, strings out. Everything is escaped; control characters, escape sequences and marks that turn the
direction of what follows are left out, as in the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from jobs.control_characters import safe as safe


def plain(text: str) -> str:
    """Return a text as HTML."""
    return escape(safe(text))


def colored(pieces: Iterable[tuple[str, str]]) -> str:
    """Return the pieces of a text as HTML: accepted draft tokens marked, the target's own as they are.

    `bdi` keeps a text that runs from right to left from turning its surroundings.
    """
    spans = (
        f'<span class="by-{"draft" if source == "draft" else "target"}">{plain(text)}</span>' for text, source in pieces
    )
    return f'<bdi class="model-text">{"".join(spans)}</bdi>'


def token(text: str) -> str:
    """Return a token as a label: spaces and line ends seen, and not too long."""
    shown = safe(text.replace("\n", "⏎").replace("\t", "⇥")).replace(" ", "␣") or "∅"
    return shown if len(shown) <= 14 else f"{shown[:13]}…"
