"""Read texts by a grammar without a model.

llguidance finds out only while it reads a text that a grammar is too complex. So each grammar is tried with random
texts of it, byte by byte; the same grammar gets the same texts.
"""

from __future__ import annotations

import random
from functools import cache, lru_cache
from typing import Final

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from jobs.grammar.patterns import search_patterns

_TEXTS: Final = 3
_BYTES: Final = 160  # of each text
_FREQUENT: Final = b'{}[]",:0123456789abcdeinrst -.'
_END: Final = 256


class _ByteTokenizer:
    """A vocabulary of all bytes, and an end."""

    eos_token_id = _END
    bos_token_id = None
    special_token_ids = (_END,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the bytes of a text as token ids."""
        return list(text.encode() if isinstance(text, str) else text)


@cache
def byte_tokenizer() -> LLTokenizer:
    """Return the tokenizer whose tokens are the bytes."""
    return LLTokenizer(TokenizerWrapper(_ByteTokenizer()), slices=[])


def is_found(pattern: str, text: str) -> bool:
    """Return whether a pattern of a schema is found in a text, in time that grows with the text only.

    Python's `re` may take hours. Raise RequestRefused if the pattern can't be held.
    """
    content = list(text.encode())
    readers = (first.deep_copy() for first in _readers(pattern))
    return all(reader.try_consume_tokens(content) == len(content) and reader.is_accepting() for reader in readers)


@lru_cache(maxsize=256)
def _readers(pattern: str) -> tuple[LLMatcher, ...]:
    grammars = map(LLMatcher.grammar_from_regex, search_patterns(pattern))
    return tuple(LLMatcher(byte_tokenizer(), grammar, log_level=0) for grammar in grammars)


def find_fault(grammar: str) -> str | None:
    """Return why no text, or not every text, of the grammar can be read; None if the trial finds nothing."""
    first = LLMatcher(byte_tokenizer(), grammar, log_level=0)
    return next((fault for seed in range(_TEXTS) if (fault := _read(first.deep_copy(), seed)) is not None), None)


def _read(matcher: LLMatcher, seed: int) -> str | None:
    choices = random.Random(seed)
    for _ in range(_BYTES):
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            return matcher.get_error().splitlines()[0]
        likely = _likely_bytes(mask)
        if not likely:
            return None if matcher.is_accepting() or matcher.is_stopped() else "no text is complete"
        matcher.consume_token(choices.choice(likely))
    return None


@lru_cache(maxsize=1024)  # few masks repeat through a text, and listing the bytes of one takes longer than all else
def _likely_bytes(mask: bytes) -> tuple[int, ...]:
    """Return the frequent bytes of a mask; all of them if none is frequent."""
    allowed = [byte for byte in range(256) if mask[byte >> 3] >> (byte & 7) & 1]
    return tuple([byte for byte in allowed if byte in _FREQUENT] or allowed)
