"""Read texts by a grammar, byte by byte, and write random ones."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from llguidance import LLMatcher

from jobs.grammar.compiler import check, grammar_text
from jobs.grammar.trial import byte_tokenizer
from jobs.messages import GrammarSpec

_MAX_BYTES = 500


def schema_spec(schema: Any, whitespace: str | None = None) -> GrammarSpec:
    """The grammar of a schema."""
    return GrammarSpec(kind="json_schema", value=json.dumps(schema), whitespace=whitespace)


def reader(spec: GrammarSpec) -> LLMatcher:
    """A reader of texts of a grammar that the API server takes."""
    check(spec, "field")
    matcher = LLMatcher(byte_tokenizer(), grammar_text(spec), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(matcher: LLMatcher, text: str) -> bool:
    """Whether the grammar allows this text, and no more is needed."""
    copy, content = matcher.deep_copy(), list(text.encode())
    return copy.try_consume_tokens(content) == len(content) and copy.is_accepting()


def random_text(matcher: LLMatcher, seed: int) -> str | None:
    """A finished text of the grammar; None if it becomes too long."""
    choices, text, copy = random.Random(seed), bytearray(), matcher.deep_copy()
    for _ in range(_MAX_BYTES):
        if copy.is_accepting() and (copy.is_stopped() or choices.random() < 0.5):
            return text.decode()
        allowed, ends, usual = _bytes_of(copy.compute_bitmask())
        share = choices.random()
        some = ends if share < 0.35 and ends else usual if share < 0.93 and usual else allowed
        byte = choices.choice(some)
        copy.consume_token(byte)
        text.append(byte)
    return None


@cache
def _bytes_of(mask: bytes) -> tuple[list[int], list[int], list[int]]:
    """The bytes of a mask: all, those that end something, and usual ones."""
    allowed = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
    ends = [byte for byte in allowed if byte in b'"}]']
    usual = [byte for byte in allowed if byte in b'0123456789abcxyzAB_-. ,:+/{["tfn\\']
    return allowed, ends, usual
