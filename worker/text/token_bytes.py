"""Text and bytes of single tokens.

A text is decoded as a whole (`worker.text.codec`); here a token stands alone, and may be part of a character.
"""

from __future__ import annotations

import json
import re
from functools import cached_property, lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jobs.openai.logprobs import ScoredToken, TokenAlternatives
from storage.dialect import storable
from worker.engine.logprobs import TokenLogprobs

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Spells the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look at how the tokenizer decodes."""
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        self._decoder = tokenizer.backend_tokenizer.decoder
        self._decoders = _decoders(tokenizer)
        self._byte_of: dict[str, int] = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
        self._special = frozenset(token for token, added in self._added.items() if added.special)
        self._known: dict[tuple[int, bool], tuple[str, tuple[int, ...] | None]] = {}

    @cached_property
    def neutral_prefix(self) -> tuple[int, ...]:
        """Tokens of an ordinary letter: behind them a token reads as in the midst of a text."""
        return tuple(self._tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids)

    def is_special(self, token: int) -> bool:
        """Return whether a token is a special one, which adds nothing to a text."""
        return token in self._special

    def of(self, told: TokenLogprobs, token: int, *, first: bool = False) -> TokenAlternatives:
        """Return a token and its alternatives as they are told to people; `first`: a text begins with them."""
        return TokenAlternatives(
            self._likelihood(token, told.logprob, first),
            tuple(self._likelihood(other, p, first) for other, p in told.top),
        )

    def text_and_bytes(self, token: int, *, first: bool = False) -> tuple[str, tuple[int, ...] | None]:
        """Return a token's text and its bytes. Special tokens add none to a text."""
        if (token, first) not in self._known:
            self._known[token, first] = self._text_and_bytes(token, first)
        return self._known[token, first]

    def _likelihood(self, token: int, logprob: float, first: bool) -> ScoredToken:
        text, own = self.text_and_bytes(token, first=first)
        return ScoredToken(text, logprob, own)

    def _text_and_bytes(self, token: int, first: bool) -> tuple[str, tuple[int, ...] | None]:
        symbols: Any = self._tokenizer.convert_ids_to_tokens(token)  # of one id; typed for lists, too
        if symbols is None:  # the model has more rows of logits than the tokenizer has tokens
            return f"<{token}>", None
        if token in self._added:
            special = self._added[token].special
            return storable(symbols), None if special else tuple(symbols.encode())
        own = self._bytes(symbols, first)
        return storable(own.decode(errors="replace")), tuple(own)

    def _bytes(self, symbols: str, first: bool) -> bytes:
        if "ByteLevel" in self._decoders:
            known = [self._byte_of.get(symbol) for symbol in symbols]
            return bytes(byte for byte in known if byte is not None) if None not in known else symbols.encode()
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(symbols)):
            return bytes([int(byte[1], 16)])
        return self._text(symbols, first).encode()

    def _text(self, symbols: str, first: bool) -> str:
        """Return what a token adds in the midst of a text, or as its first: there some decoders strip a space."""
        if self._decoder is None:
            return symbols
        if first:
            return str(self._decoder.decode([symbols]))
        return str(self._decoder.decode(["a", symbols])).removeprefix(str(self._decoder.decode(["a"])))


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    """Return the spelling of a tokenizer, which remembers what it has spelt."""
    return TokenBytes(tokenizer)


def _decoders(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    own = tokenizer.backend_tokenizer.decoder
    decoder = {} if own is None else json.loads(own.__getstate__())
    return frozenset(part["type"] for part in [decoder, *decoder.get("decoders", [])] if "type" in part)
