"""Text and bytes of single tokens, for log-probabilities and for bytes that are no valid UTF-8.

`worker.text.codec` decodes whole texts; here a token stands alone and may be a part of a character.
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
from worker.engine.token_logprobs import TokenLogprobs

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Text and bytes of the tokens of one tokenizer, cached."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._added = dict(tokenizer.added_tokens_decoder)
        self._decoder = tokenizer.backend_tokenizer.decoder
        self._decoders = _decoders(tokenizer)
        self._byte_of: dict[str, int] = {symbol: byte for byte, symbol in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
        self._special = frozenset(token for token, added in self._added.items() if added.special)
        self._cache: dict[tuple[int, bool], tuple[str, tuple[int, ...] | None]] = {}

    @cached_property
    def neutral_prefix(self) -> tuple[int, ...]:
        """Tokens of a plain letter: a token after them decodes as inside a text."""
        return tuple(self._tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids)

    @property
    def special(self) -> frozenset[int]:
        """The ids of special tokens."""
        return self._special

    def is_special(self, token: int) -> bool:
        """Return whether a token is special: then it adds nothing to a text."""
        return token in self._special

    def likelihoods(
        self, entry: TokenLogprobs, token: int, *, first: bool = False, shown: frozenset[int] = frozenset()
    ) -> TokenAlternatives:
        """Return the log-probabilities of a token and its alternatives with their texts.

        `first`: they start a text. `shown` special tokens are text, and so have bytes.
        """
        chosen, *top = (
            self._token_likelihood(each, logprob, first, shown)
            for each, logprob in ((token, entry.logprob), *entry.top)
        )
        return TokenAlternatives(chosen, tuple(top))

    def text_and_bytes(self, token: int, *, first: bool = False) -> tuple[str, tuple[int, ...] | None]:
        """Return a token's text and its bytes; None for special tokens, which add no bytes."""
        if (token, first) not in self._cache:
            self._cache[token, first] = self._text_and_bytes(token, first)
        return self._cache[token, first]

    def _token_likelihood(self, token: int, logprob: float, first: bool, shown: frozenset[int]) -> ScoredToken:
        text, raw = self.text_and_bytes(token, first=first)
        return ScoredToken(text, logprob, tuple(text.encode()) if token in shown else raw)

    def _text_and_bytes(self, token: int, first: bool) -> tuple[str, tuple[int, ...] | None]:
        symbols: Any = self._tokenizer.convert_ids_to_tokens(token)  # one id gives one token; the type covers lists too
        if symbols is None:  # the vocabulary of the model is larger than the tokenizer's
            return f"<{token}>", None
        if token in self._added:
            special = self._added[token].special
            return storable(symbols), None if special else tuple(symbols.encode())
        raw = self._bytes(symbols, first)
        return storable(raw.decode(errors="replace")), tuple(raw)

    def _bytes(self, symbols: str, first: bool) -> bytes:
        if "ByteLevel" in self._decoders:
            known = [self._byte_of.get(symbol) for symbol in symbols]
            return bytes(byte for byte in known if byte is not None) if None not in known else symbols.encode()
        if "ByteFallback" in self._decoders and (byte := _BYTE.fullmatch(symbols)):
            return bytes([int(byte[1], 16)])
        return self._text(symbols, first).encode()

    def _text(self, symbols: str, first: bool) -> str:
        """Return the text of a token inside a text, or as the first token, where some decoders strip a space."""
        if self._decoder is None:
            return symbols
        if first:
            return str(self._decoder.decode([symbols]))
        return str(self._decoder.decode(["a", symbols])).removeprefix(str(self._decoder.decode(["a"])))


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    """Return the `TokenBytes` of a tokenizer: the same object in later calls, so that its cache is kept."""
    return TokenBytes(tokenizer)


def _decoders(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    raw = tokenizer.backend_tokenizer.decoder
    decoder = {} if raw is None else json.loads(raw.__getstate__())
    return frozenset(part["type"] for part in [decoder, *decoder.get("decoders", [])] if "type" in part)
