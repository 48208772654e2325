"""Log-probabilities of one token, as results hold them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one emitted token and of the most likely tokens at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), most likely first, ties by token id


Logprobs = tuple[TokenLogprobs, ...] | None  # of one sequence's tokens in one step; None: not requested
