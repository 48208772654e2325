"""The detokenizer: token ids to text as they come, whole characters only, whatever the ids are.

A token is decoded behind those whose text has been told, because some decoders treat the first token of a text
differently. `tokenizers`' own stream does the same, and raises where bytes that follow each other are no UTF-8
together. Here the bytes of such tokens are read one by one and decoding starts again behind them: what is no character
becomes U+FFFD, and every other byte stays what it is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from worker.text.token_bytes import token_bytes

_BROKEN = "\ufffd"
_MOST_HELD = 16  # tokens; a character has four bytes, so it is complete within four tokens that have any
_TAIL = 8  # tokens of a prompt that its continuation is decoded behind


class Detokenizer:
    """Decodes one text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int] | None = None) -> None:
        """Start a text of its own, or one that continues the tokens `before`, which may be any or none."""
        self._backend = tokenizer.backend_tokenizer
        self._token_bytes = token_bytes(tokenizer)
        self._known: list[int] = [] if before is None else self._tail(before)
        self._told = self._decode(self._known)  # the text of the known tokens
        self._held: list[int] = []  # tokens behind them whose text is not complete

    def push(self, token: int) -> str:
        """Add a token; return the text that is complete now."""
        if self._token_bytes.is_special(token):
            return ""
        self._held.append(token)
        whole, full = self._decode([*self._known, *self._held]), len(self._held) > _MOST_HELD
        if whole.endswith(_BROKEN) and not full:
            return ""
        text = self._new(whole)
        if full or text is None:
            return self._read_bytes()
        if text:
            self._known, self._held = self._held, []
            self._told = self._decode(self._known)
        return text

    def finish(self) -> str:
        """Return what is left: bytes of a character that never became complete."""
        text = self._new(self._decode([*self._known, *self._held]))
        return self._bytes_of(self._held).decode(errors="replace") if text is None else text

    def _new(self, whole: str) -> str | None:
        """Return the new part of a decoded text; None if it does not continue what was told, or has broken bytes."""
        new = whole[len(self._told) :]
        return None if not whole.startswith(self._told) or _BROKEN in new else new

    def _read_bytes(self) -> str:
        """Read the held tokens byte by byte, and hold back no more than the beginning of a character."""
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        text, complete, told = "", 0, ""
        for count, token in enumerate(self._held, start=1):
            text += reader.decode(self._own(token, first=not self._known and count == 1))
            if not reader.getstate()[0]:
                complete, told = count, text
        self._held = self._held[complete:]
        self._known = list(self._token_bytes.neutral_prefix)
        self._told = self._decode(self._known)
        return told

    def _bytes_of(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._own(token, first=not self._known and i == 0) for i, token in enumerate(tokens))

    def _own(self, token: int, *, first: bool) -> bytes:
        return bytes(self._token_bytes.text_and_bytes(token, first=first)[1] or ())

    def _tail(self, before: Sequence[int]) -> list[int]:
        """Return the last tokens of a text if they are readable by themselves, else an ordinary one."""
        tail = [token for token in before[-_TAIL:] if not self._token_bytes.is_special(token)]
        text = self._decode(tail)
        return tail if text and _BROKEN not in text else list(self._token_bytes.neutral_prefix)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=True)) if ids else ""
