"""What a text must be: schemas, expressions and grammars of callers, as grammars of llguidance."""

from __future__ import annotations
