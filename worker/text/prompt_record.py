"""What an answer returns of its prompt, while the prompt is read: an echo, token ids, log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.messages import CHAT_ENDPOINT, GenerationRequest
from jobs.openai.logprobs import ScoredToken, TokenAlternatives
from jobs.openai.prompt_details import PromptDetails, PromptToken
from worker.engine.token_logprobs import TokenLogprobs
from worker.text.codec import Codec
from worker.text.token_bytes import token_bytes


class PromptRecord:
    """What the answers to one prompt return of it; for a choice that is not the prompt's first, its echo only."""

    def __init__(
        self, codec: Codec, request: GenerationRequest, endpoint: str, number: int, ids: Sequence[int], *, first: bool
    ) -> None:
        """Take the prompt with this number in its request, and its token ids."""
        self._token_bytes = token_bytes(codec.tokenizer)
        self._ids = ids
        self._first = first
        self._details = PromptDetails.of(request.sampling, endpoint, ids)
        self.echo = _echo(codec, request, endpoint, number, ids)  # text before that of the answer

    @property
    def top(self) -> int | None:
        """Most likely tokens that the engine must report per prompt token; None: no log-probabilities."""
        return self._details.scored_top if self._first else None

    def take(self, logprobs: Sequence[TokenLogprobs]) -> None:
        """Take the log-probabilities of the prompt's tokens but the first."""
        text, raw = self._token_bytes.text_and_bytes(self._ids[0], first=True)
        first = PromptToken((self._ids[0],), 0, TokenAlternatives(ScoredToken(text, None, raw), ()))
        others = [self._scored(token, entry) for token, entry in zip(self._ids[1:], logprobs, strict=True)]
        self._details = replace(self._details, tokens=(first, *others))

    def _scored(self, token: int, entry: TokenLogprobs) -> PromptToken:
        ids = (token, *(other for other, _ in entry.top))
        return PromptToken(ids, entry.rank, self._token_bytes.likelihoods(entry, token))

    def stored(self) -> Mapping[str, Any] | None:
        """Return what is stored with the choice; None if the request asks for nothing."""
        if not self._details.wanted:
            return None
        return self._details.stored() if self._first else {}


def _echo(codec: Codec, request: GenerationRequest, endpoint: str, number: int, ids: Sequence[int]) -> str:
    """Return the text that an answer repeats: its prompt, or the message that it continues."""
    sampling = request.sampling
    if not sampling.echo:
        return ""
    if request.messages is not None:
        return request.messages[-1].content if request.messages[-1].role == "assistant" else ""
    prompt = request.prompt if request.prompts is None else request.prompts[number]
    if isinstance(prompt, str) and sampling.truncate_prompt_tokens is None:
        return "" if endpoint == CHAT_ENDPOINT else prompt
    return codec.decode(ids, skip_special_tokens=sampling.skip_special_tokens)
