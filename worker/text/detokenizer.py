"""Incremental detokenizer: token ids to text, complete characters only, for any sequence of ids.

Tokens are decoded together with the tokens before them (the context), because some decoders treat the first token of a
text differently. `tokenizers`' own stream does the same, but raises on bytes that are no valid UTF-8. Here such bytes
are decoded one by one, and decoding restarts after them: an invalid byte becomes U+FFFD, all others keep their meaning.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from worker.text.token_bytes import token_bytes

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 16  # tokens; a character has up to 4 bytes, so it is complete within 4 tokens that have bytes
_CONTEXT_TOKENS = 8  # max number of prompt tokens before the text


class Detokenizer:
    """Incremental decoder of one text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        before: Sequence[int] | None = None,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """Continue the tokens `before`; None starts a new text. `shown` special tokens are text, others are not."""
        self._shown = shown
        self._backend = tokenizer.backend_tokenizer
        self._token_bytes = token_bytes(tokenizer)
        self._context: list[int] = [] if before is None else self._context_of(before)
        self._context_text = self._decode(self._context)  # decoded text of the context
        self._pending: list[int] = []  # tokens after the context whose text is incomplete

    def push(self, token: int) -> str:
        """Add a token; return the text that is now complete."""
        if self._token_bytes.is_special(token) and token not in self._shown:
            return ""
        self._pending.append(token)
        whole, overflow = self._decode([*self._context, *self._pending]), len(self._pending) > _MAX_PENDING
        if whole.endswith(_REPLACEMENT) and not overflow:
            return ""
        text = self._new_text(whole)
        if overflow or text is None:
            return self._read_bytes()
        if text:
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return text

    def finish(self) -> str:
        """Return the rest: the bytes of an incomplete character."""
        text = self._new_text(self._decode([*self._context, *self._pending]))
        return self._bytes_of(self._pending).decode(errors="replace") if text is None else text

    def _new_text(self, whole: str) -> str | None:
        """Return the part after the context; None if the text does not start with it, or has invalid bytes."""
        new = whole[len(self._context_text) :]
        return None if not whole.startswith(self._context_text) or _REPLACEMENT in new else new

    def _read_bytes(self) -> str:
        """Decode the pending tokens byte by byte; keep only an incomplete character pending."""
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        text, complete, complete_text = "", 0, ""
        for count, token in enumerate(self._pending, start=1):
            text += reader.decode(self._token_to_bytes(token, first=not self._context and count == 1))
            if not reader.getstate()[0]:
                complete, complete_text = count, text
        self._pending = self._pending[complete:]
        self._context = list(self._token_bytes.neutral_prefix)
        self._context_text = self._decode(self._context)
        return complete_text

    def _bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(
            self._token_to_bytes(token, first=not self._context and i == 0) for i, token in enumerate(tokens)
        )

    def _token_to_bytes(self, token: int, *, first: bool) -> bytes:
        text, raw = self._token_bytes.text_and_bytes(token, first=first)
        return text.encode() if token in self._shown else bytes(raw or ())

    def _context_of(self, before: Sequence[int]) -> list[int]:
        """Return the last tokens of a text if they decode on their own, else the neutral prefix."""
        tail = [token for token in before[-_CONTEXT_TOKENS:] if not self._token_bytes.is_special(token)]
        text = self._decode(tail)
        return tail if text and _REPLACEMENT not in text else list(self._token_bytes.neutral_prefix)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=not self._shown)) if ids else ""
