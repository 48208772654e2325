"""The grammar of a sequence, as the request process sends it to the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an output must match, from a point of it on."""

    text: str  # llguidance's own notation: what its `LLMatcher` takes
    after: tuple[int, ...] = ()  # token ids; the grammar binds what follows their first occurrence. Empty: all output
