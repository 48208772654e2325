"""Output of one sequence: tokens, text pieces and statistics of each step, cut at the first stop string.

The engine knows token ids only and may have decoded past a stop string within a step. Here the surplus tokens are
removed from the sequence and from the statistics of that step.
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
    """Output of one step up to the end of the text."""

    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]  # per token: True for an accepted draft token
    pieces: Pieces  # final text
    stats: StepStats
    logprobs: tuple[TokenAlternatives, ...] | None  # per token, if requested


class OutputStream:
    """A sequence and its text."""

    def __init__(self, sequence: Sequence, stream: TextStream) -> None:
        self.sequence = sequence
        self._stream = stream

    @property
    def text(self) -> str:
        """Text returned so far."""
        return self._stream.text

    def resume(self, tokens: Seq[int], accepted: Seq[bool]) -> None:
        """Restore tokens that an earlier worker has committed."""
        self._stream.resume(tokens, accepted)
        self.sequence.ids += tokens

    def take(self, result: StepResult) -> StepOutput:
        """Add the result of a step. A stop string in the text finishes the sequence."""
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
