"""Output of one sequence: tokens, text pieces and statistics of each step, cut at the first stop string.

The engine knows token ids only, and it runs on before the text of a step is read. Here the tokens after a stop string
are removed from the output and from the statistics of their step. Cancel the sequence then: the engine does not know.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from jobs.openai.logprobs import TokenAlternatives
from worker.engine.sequence import FinishReason
from worker.engine.stats import StepResult, StepStats
from worker.text.stop_strings import Pieces
from worker.text.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Output of one step up to the end of the text."""

    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]  # per token: True for an accepted draft token
    pieces: Pieces  # final text
    stats: StepStats
    logprobs: tuple[TokenAlternatives, ...] | None  # per token, if requested


class OutputStream:
    """Tokens and text of one sequence."""

    def __init__(self, key: Hashable, stream: TextStream, echo: str = "") -> None:
        """Start without tokens; `key` is that of the sequence, and the text begins with `echo`."""
        self.key = key
        self.echo = echo
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stream = stream

    @property
    def text(self) -> str:
        """Text returned so far."""
        return self.echo + self._stream.text

    @property
    def reasoning_tokens(self) -> int | None:
        """Tokens of the reasoning so far; None if the format has none."""
        return self._stream.reasoning_tokens

    @property
    def finished(self) -> bool:
        """True when nothing more belongs to the output."""
        return self.finish_reason is not None

    def resume(self, tokens: Seq[int], accepted: Seq[bool]) -> None:
        """Restore tokens that an earlier worker has committed."""
        self._stream.resume(tokens, accepted)
        self.token_ids += tokens

    def take(self, result: StepResult) -> StepOutput:
        """Add what the engine emitted in a step. A stop string in the text finishes the output."""
        tokens, stats, logprobs = result.tokens, result.stats, result.logprobs
        accepted = [i < stats.accepted_tokens for i in range(len(tokens))]
        before = self._stream.num_tokens
        pieces = self._stream.push(tokens, accepted, ended=result.finish_reason is FinishReason.STOP)
        count = self._stream.num_tokens - before
        self.finish_reason = result.finish_reason
        if result.finish_reason is not None:
            pieces += self._stream.finish()
        if self._stream.stopped:
            self.finish_reason = FinishReason.STOP
        elif self.finish_reason is FinishReason.STOP:
            self._stream.end()
        kept = tokens[:count]
        self.token_ids += kept
        return StepOutput(
            tokens=kept,
            accepted=tuple(accepted[:count]),
            pieces=pieces,
            stats=replace(stats, emitted_tokens=count, accepted_tokens=sum(accepted[:count])),
            logprobs=None if logprobs is None else self._stream.readable_logprobs(kept, logprobs),
        )
