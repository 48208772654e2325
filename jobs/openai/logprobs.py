"""Log-probabilities of a text's tokens: how they are stored, and how OpenAI's two endpoints spell them.

A token is told as a text and its bytes: a token that is part of a character has bytes of its own and a text with
U+FFFD; one that adds nothing to the text, as the end-of-sequence token, has no bytes. Joined, the bytes are the text,
up to where a stop string cut it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.messages import CHAT_ENDPOINT

Json = dict[str, Any]
Stored = list[Any]  # of one token: [text, logprob] or [text, logprob, bytes], and one such list for each alternative


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and how likely the model found it in its place."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None  # UTF-8, or a part of it; None: the token adds nothing to the text

    def stored(self) -> list[Any]:
        """Return it as JSON. Bytes are left out where they are the text's."""
        if self.bytes == tuple(self.token.encode()):
            return [self.token, self.logprob]
        return [self.token, self.logprob, None if self.bytes is None else list(self.bytes)]

    @classmethod
    def read(cls, stored: Sequence[Any]) -> ScoredToken:
        """Return what was stored."""
        token, logprob = stored[:2]
        own = stored[2] if len(stored) > 2 else token.encode()
        return cls(token, logprob, None if own is None else tuple(own))

    def as_chat(self) -> Json:
        """Return it in the words of chat completions."""
        return {
            "token": self.token,
            "logprob": self.logprob,
            "bytes": None if self.bytes is None else list(self.bytes),
        }

    @property
    def spelling(self) -> str:
        """The token where there is no room for its bytes: parts of characters are spelt `bytes:\\xe2\\x82`."""
        if self.bytes is None or self.bytes == tuple(self.token.encode()):
            return self.token
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


@dataclass(frozen=True, slots=True)
class TokenAlternatives:
    """A token of a text, and the likeliest tokens in its place, likeliest first; it may be one of them."""

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]

    def stored(self) -> Stored:
        """Return them as JSON."""
        return [self.chosen.stored(), *(other.stored() for other in self.top)]

    @classmethod
    def read(cls, stored: Stored) -> TokenAlternatives:
        """Return what was stored."""
        chosen, *top = map(ScoredToken.read, stored)
        return cls(chosen, tuple(top))


def logprobs_object(endpoint: str, stored: Sequence[Stored] | None, text: str) -> Json | None:
    """Return `choices[].logprobs` as the endpoint has it; None if none were wanted."""
    if stored is None:
        return None
    tokens = [TokenAlternatives.read(row) for row in stored]
    return _of_a_chat(tokens) if endpoint == CHAT_ENDPOINT else _of_a_completion(tokens, text)


def _of_a_chat(tokens: Sequence[TokenAlternatives]) -> Json:
    content = [t.chosen.as_chat() | {"top_logprobs": [other.as_chat() for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _of_a_completion(tokens: Sequence[TokenAlternatives], text: str) -> Json:
    return {
        "tokens": [t.chosen.spelling for t in tokens],
        "token_logprobs": [t.chosen.logprob for t in tokens],
        "top_logprobs": [_by_spelling(t) for t in tokens],
        "text_offset": list(_offsets(tokens, text)),
    }


def _by_spelling(token: TokenAlternatives) -> dict[str, float]:
    """Return the alternatives and the token itself; of two that are spelt alike, the likelier."""
    likeliest: dict[str, float] = {}
    for one in (*token.top, token.chosen):
        likeliest.setdefault(one.spelling, one.logprob)
    return likeliest


def _offsets(tokens: Sequence[TokenAlternatives], text: str) -> Iterator[int]:
    """Yield for each token the character of the text at which it begins, or whose part it is."""
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    begun = [reader.decode(bytes(t.chosen.bytes or ())) for t in tokens]
    # Some tokenizers leave out the space with which a text would begin.
    at = -max(0, "".join(begun).find(text)) if text else 0
    for characters in begun:
        yield min(max(at, 0), len(text))
        at += len(characters)
