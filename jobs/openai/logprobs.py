"""Log-probabilities per token: the stored form, and the forms of OpenAI's two endpoints.

Each token has text and bytes. The text of a token that is part of a character has U+FFFD. A token without text, such as
the end-of-sequence token, has no bytes. The bytes of all tokens joined are the text, before a stop string cuts it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jobs.messages import COMPLETIONS_ENDPOINT

Json = dict[str, Any]
Stored = list[Any]  # one token, then its alternatives, each as [text, logprob] or [text, logprob, bytes]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and its log-probability."""

    token: str
    logprob: float | None  # None: the first token of a prompt
    bytes: tuple[int, ...] | None  # UTF-8, possibly part of a character; None: a token without text

    def stored(self) -> list[Any]:
        """Return the stored form, without the bytes if they are the text's UTF-8."""
        if self.bytes == tuple(self.token.encode()):
            return [self.token, self.logprob]
        return [self.token, self.logprob, None if self.bytes is None else list(self.bytes)]

    @classmethod
    def read(cls, stored: Sequence[Any]) -> ScoredToken:
        """Return the token with the log-probability and the bytes that are stored."""
        token, logprob = stored[:2]
        own = stored[2] if len(stored) > 2 else token.encode()
        return cls(token, logprob, None if own is None else tuple(own))

    def as_chat(self) -> Json:
        """Return the form of chat completions."""
        return {
            "token": self.token,
            "logprob": self.logprob,
            "bytes": None if self.bytes is None else list(self.bytes),
        }

    @property
    def spelling(self) -> str:
        """The token as one string; parts of characters are spelt `bytes:\\xe2\\x82`."""
        if self.bytes is None or "\ufffd" not in self.token or self.bytes == tuple(self.token.encode()):
            return self.token
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


@dataclass(frozen=True, slots=True)
class TokenAlternatives:
    """A generated token and the top-k tokens at its position, most likely first; they may include it."""

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]

    def renamed(self, names: Sequence[str]) -> TokenAlternatives:
        """Return the token and its alternatives under other names, with their own bytes."""
        own, *others = (replace(one, token=name) for one, name in zip((self.chosen, *self.top), names, strict=True))
        return TokenAlternatives(own, tuple(others))

    def stored(self) -> Stored:
        """Return the stored form: the token itself, then its alternatives."""
        return [self.chosen.stored(), *(other.stored() for other in self.top)]

    @classmethod
    def read(cls, stored: Stored) -> TokenAlternatives:
        """Return the chosen token and its alternatives from what is stored."""
        chosen, *top = map(ScoredToken.read, stored)
        return cls(chosen, tuple(top))


def logprobs_object(
    endpoint: str, stored: Sequence[Stored] | None, text: str, echoed: Sequence[TokenAlternatives] | None = None
) -> Json | None:
    """Return `choices[].logprobs` in the endpoint's form, after the `echoed` tokens; None if none were requested."""
    if stored is None and echoed is None:
        return None
    tokens = [*(echoed or ()), *map(TokenAlternatives.read, stored or ())]
    return _completion_object(tokens, text) if endpoint == COMPLETIONS_ENDPOINT else _chat_object(tokens)


def _chat_object(tokens: Sequence[TokenAlternatives]) -> Json:
    content = [t.chosen.as_chat() | {"top_logprobs": [other.as_chat() for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _completion_object(tokens: Sequence[TokenAlternatives], text: str) -> Json:
    return {
        "tokens": [t.chosen.spelling for t in tokens],
        "token_logprobs": [t.chosen.logprob for t in tokens],
        "top_logprobs": [_by_spelling(t) for t in tokens],
        "text_offset": list(_offsets(tokens, text)),
    }


def _by_spelling(token: TokenAlternatives) -> dict[str, float] | None:
    """Return logprobs of the alternatives and the token; of two with the same spelling, the more likely."""
    if token.chosen.logprob is None:
        return None
    likeliest: dict[str, float] = {}
    for one in (*token.top, token.chosen):
        likeliest.setdefault(one.spelling, one.logprob or 0.0)
    return likeliest


def _offsets(tokens: Sequence[TokenAlternatives], text: str) -> Iterator[int]:
    """Yield for each token the index of the character in which it begins."""
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [reader.decode(bytes(t.chosen.bytes or ())) for t in tokens]
    # Some tokenizers drop the leading space of a text.
    at = -max(0, "".join(parts).find(text)) if text else 0
    for token, characters in zip(tokens, parts, strict=True):
        yield min(max(at, 0), len(text))
        name = token.chosen.token  # a prompt may spell special tokens, which have no bytes
        spelt = token.chosen.bytes is None and at >= 0 and text.startswith(name, at)
        at += len(name if spelt else characters)
