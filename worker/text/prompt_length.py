"""Lower bound of a text's token count, from its length: prompts that can't fit are refused without slow tokenization.

Applies only to tokenizers in which every token covers a part of the text and no part is dropped; for all others the
bound is 0.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import Any

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_NORMALIZERS = {"Prepend", "Replace", "NFC"}
_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Metaspace"}


class PromptLength:
    """Minimal number of tokens of a text, for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Inspect the normalizers, pre-tokenizers and vocabulary of the tokenizer."""
        backend = tokenizer.backend_tokenizer
        normalizers, pre_tokenizers = list(_parts(backend.normalizer)), list(_parts(backend.pre_tokenizer))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._composes = any(part["type"] == "NFC" for part in normalizers)
        self._in_bytes = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        self._max_token_length = max(map(len, vocabulary), default=0)
        alphabet = bytes_to_unicode().values() if self._in_bytes else [f"<0x{byte:02X}>" for byte in range(256)]  # type: ignore[no-untyped-call]
        model = backend.model
        self._applies = (
            isinstance(model, BPE)
            and (self._in_bytes or bool(model.byte_fallback))
            and all(symbol in vocabulary for symbol in alphabet)
            and all(part["type"] in _NORMALIZERS and not _shortens(part) for part in normalizers)
            and all(part["type"] in _PRE_TOKENIZERS and part.get("behavior") != "Removed" for part in pre_tokenizers)
            and not any(added.lstrip or added.rstrip for added in tokenizer.added_tokens_decoder.values())
        )

    def min_tokens(self, text: str) -> int:
        """Return a lower bound of the number of tokens of `text`; 0 if the tokenizer gives none."""
        if not self._applies or (self._composes and not unicodedata.is_normalized("NFC", text)):
            return 0
        size = len(text.encode(errors="replace")) if self._in_bytes else len(text)
        return -(-size // self._max_token_length)


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer or pre-tokenizer in the form of `tokenizer.json`."""
    if component is None:
        return
    whole = json.loads(component.__getstate__())
    yield from _flat(whole)


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = part.get("normalizers") or part.get("pretokenizers")
    if inner is None:
        yield part
    else:
        for one in inner:
            yield from _flat(one)


def _shortens(part: dict[str, Any]) -> bool:
    """Return whether a normalizer may shorten a text, other than by Unicode composition."""
    if part["type"] != "Replace":
        return False
    pattern = part["pattern"].get("String")
    return pattern is None or len(part["content"]) < len(pattern)
