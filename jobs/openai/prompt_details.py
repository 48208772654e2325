"""What an answer returns of its prompt, if requested: token ids and log-probabilities, in OpenAI's and vLLM's shapes.

A worker stores it with the first choice of each prompt (`outputs.prompt`); the other choices share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from jobs.messages import COMPLETIONS_ENDPOINT, SamplingParameters
from jobs.openai.logprobs import ScoredToken, TokenAlternatives

Json = dict[str, Any]


def token_name(token_id: int) -> str:
    """Return vLLM's name of a token, with `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}"


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt. The first has no log-probability and no alternatives: nothing precedes it."""

    ids: tuple[int, ...]  # of the token, then of its alternatives
    rank: int  # how many tokens of the vocabulary are at least as likely, itself included; 0 for the first
    scored: TokenAlternatives

    def stored(self) -> list[Any]:
        """Return the stored form."""
        return [self.rank, list(self.ids), self.scored.stored()]

    @classmethod
    def read(cls, stored: Sequence[Any]) -> Self:
        """Return the token of a stored form."""
        rank, ids, scored = stored
        return cls(tuple(ids), rank, TokenAlternatives.read(scored))

    def first(self, count: int, *, named: bool) -> TokenAlternatives:
        """Return the token with its `count` likeliest alternatives; `named` by their ids."""
        ids, alternatives = self.ids[: count + 1], TokenAlternatives(self.scored.chosen, self.scored.top[:count])
        return alternatives.renamed([token_name(token_id) for token_id in ids]) if named else alternatives

    def as_vllm(self, count: int) -> Json | None:
        """Return vLLM's form, by token id: the token, then its `count` likeliest alternatives by rank."""
        chosen, *top = (self.scored.chosen, *self.scored.top[:count])
        if chosen.logprob is None:
            return None
        found = {str(self.ids[0]): _entry(chosen, self.rank)}
        for rank, (token_id, other) in enumerate(zip(self.ids[1:], top, strict=False), start=1):
            found[str(token_id)] = _entry(other, rank)
        return found


def _entry(token: ScoredToken, rank: int) -> Json:
    return {"logprob": token.logprob, "rank": rank, "decoded_token": token.token}


@dataclass(frozen=True, slots=True)
class PromptDetails:
    """What answers return of one prompt, as requested."""

    token_ids: tuple[int, ...] | None = None  # with return_token_ids
    top: int | None = None  # alternatives per token, with prompt_logprobs
    echo_top: int | None = None  # alternatives per token, where the log-probabilities of a completion echo its prompt
    named: bool = False  # the echoed tokens are named by their ids
    tokens: tuple[PromptToken, ...] = ()  # with log-probabilities

    @classmethod
    def of(cls, sampling: SamplingParameters, endpoint: str, token_ids: Sequence[int]) -> Self:
        """Return what a request asks of a prompt, before its log-probabilities are known."""
        echoes = sampling.echo and endpoint == COMPLETIONS_ENDPOINT
        return cls(
            token_ids=tuple(token_ids) if sampling.return_token_ids else None,
            top=sampling.prompt_logprobs,
            echo_top=sampling.logprobs if echoes else None,
            named=sampling.return_tokens_as_token_ids,
        )

    @property
    def wanted(self) -> bool:
        """True if the request asks for anything."""
        return self.token_ids is not None or self.scored_top is not None

    @property
    def scored_top(self) -> int | None:
        """Alternatives that are needed per prompt token; None: no log-probabilities of the prompt."""
        asked = [count for count in (self.top, self.echo_top) if count is not None]
        return max(asked, default=None)

    def stored(self) -> Json:
        """Return the stored form: without what was not asked for."""
        fields = {"token_ids": self.token_ids, "top": self.top, "echo_top": self.echo_top, "named": self.named or None}
        tokens = [token.stored() for token in self.tokens] or None
        return {name: value for name, value in (fields | {"tokens": tokens}).items() if value is not None}

    @classmethod
    def read(cls, stored: Mapping[str, Any] | None) -> Self:
        """Return the details of a stored form; None: nothing was asked for."""
        found = stored or {}
        ids = found.get("token_ids")
        return cls(
            token_ids=None if ids is None else tuple(ids),
            top=found.get("top"),
            echo_top=found.get("echo_top"),
            named=found.get("named", False),
            tokens=tuple(map(PromptToken.read, found.get("tokens", ()))),
        )

    @property
    def echoed(self) -> list[TokenAlternatives] | None:
        """The tokens before those of a completion; None unless it echoes them with log-probabilities."""
        if self.echo_top is None:
            return None
        return [token.first(self.echo_top, named=self.named) for token in self.tokens]

    def fields(self) -> Json:
        """Return vLLM's fields of an answer: `prompt_token_ids` and `prompt_logprobs`, as requested."""
        found: Json = {}
        if self.token_ids is not None:
            found["prompt_token_ids"] = list(self.token_ids)
        if self.top is not None:
            found["prompt_logprobs"] = [token.as_vllm(self.top) for token in self.tokens]
        return found
