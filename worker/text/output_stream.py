"""A transcript: what one sequence has written, step by step, ended where its text meets a stop string.

The engine knows no text: within a step it may have gone on behind the stop string. Here the surplus is taken back from
the sequence and from the numbers of that step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from jobs.openai.logprobs import TokenAlternatives
from worker.engine.sequence import Sequence
from worker.engine.stats import StepResult, StepStats
from worker.text.codec import TextStream
from worker.text.stop_strings import Pieces


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step brought that counts."""

    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]  # per token: it was an accepted draft token
    pieces: Pieces  # text that can't be taken back any more
    stats: StepStats
    logprobs: tuple[TokenAlternatives, ...] | None  # per token, if the sequence wants them


class OutputStream:
    """One sequence and its text."""

    def __init__(self, sequence: Sequence, stream: TextStream) -> None:
        """Start with the sequence's prompt and an empty stream."""
        self.sequence = sequence
        self._stream = stream

    @property
    def text(self) -> str:
        """Text that has been passed on."""
        return self._stream.text

    def resume(self, tokens: Seq[int], accepted: Seq[bool]) -> None:
        """Take over tokens that an earlier owner has committed."""
        self._stream.resume(tokens, accepted)
        self.sequence.ids += tokens

    def take(self, result: StepResult) -> StepOutput:
        """Add a step; afterwards the sequence is finished if its text met a stop string."""
        accepted = [i < result.stats.accepted_tokens for i in range(len(result.tokens))]
        before = self._stream.num_tokens
        pieces = self._stream.push(result.tokens, accepted)
        count = self._stream.num_tokens - before
        if self.sequence.finished:
            pieces += self._stream.finish()
        if self._stream.stopped:
            self.sequence.cut(len(result.tokens) - count)
        stats = replace(result.stats, emitted_tokens=count, accepted_tokens=sum(accepted[:count]))
        tokens = result.tokens[:count]
        logprobs = None if result.logprobs is None else self._stream.readable_logprobs(tokens, result.logprobs)
        return StepOutput(tokens, tuple(accepted[:count]), pieces, stats, logprobs)
