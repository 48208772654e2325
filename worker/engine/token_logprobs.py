"""Log-probabilities of one token, as results hold them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one token and of the most likely tokens at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), most likely first, ties by token id
    rank: int = 0  # of a prompt token: how many tokens of the vocabulary are at least as likely, itself included


Logprobs = tuple[TokenLogprobs, ...] | None  # of one sequence's tokens in one step; None: not requested
