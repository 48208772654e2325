"""Escape text from models and callers for HTML.

Also remove control characters, escape sequences and marks of writing direction, as in the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from jobs.control_characters import safe as safe


def plain(text: str) -> str:
    """Return a text as escaped HTML."""
    return escape(safe(text))


def colored(pieces: Iterable[tuple[str, str]]) -> str:
    """Return the pieces of a text as HTML, with accepted draft tokens marked.

    `bdi` isolates right-to-left text from its surroundings.
    """
    spans = (
        f'<span class="by-{"draft" if source == "draft" else "target"}">{plain(text)}</span>' for text, source in pieces
    )
    return f'<bdi class="model-text">{"".join(spans)}</bdi>'


def token(text: str) -> str:
    """Return a token as a short label with visible white space."""
    shown = safe(text.replace("\n", "⏎").replace("\t", "⇥")).replace(" ", "␣") or "∅"
    return shown if len(shown) <= 14 else f"{shown[:13]}…"
