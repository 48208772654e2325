"""A sequence: one choice of one request while it is decoded. The engine's only mutable noun.

Token ids only: the text belongs to `worker.text.codec`, the request to `worker.serving.runner`.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import StrEnum

from worker.engine.sampling.penalties import TokenCounts
from worker.engine.sampling.sampling import Sampling
from worker.engine.segments import IntArray


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token, or a stop string
    LENGTH = "length"  # max_tokens, or the context is full


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt, tokens so far, and how much of them lies in the target's KV slot.

    Start one from `prompt_ids` plus tokens already emitted to resume it: with the same sampling its text goes on as if
    it had never stopped, for the noise is keyed by position.
    """

    key: Hashable
    ids: list[int]  # prompt, then output
    num_prompt: int
    max_tokens: int
    sampling: Sampling
    eos_ids: frozenset[int] = frozenset()
    group: Hashable = None  # texts of one group may serve as drafts of each other; None: of no other
    slot: int = -1  # KV slot; -1: not admitted
    cached: int = 0  # leading ids whose keys and values lie in the slot
    steps: int = 0  # decoding steps so far; the token from prefill is step 0
    traced_steps: int = 0  # so many steps say which trees they showed
    prefill_ms: float = 0.0  # time of prefill chunks that emitted nothing yet
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    failure: str = ""  # why it was given up
    history: TokenCounts = field(default_factory=TokenCounts)  # read only for penalties

    @property
    def output_ids(self) -> list[int]:
        """Tokens emitted so far."""
        return self.ids[self.num_prompt :]

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.max_tokens - (len(self.ids) - self.num_prompt)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output together, at most."""
        return self.num_prompt + self.max_tokens

    @property
    def prefilling(self) -> bool:
        """True until the newest token is the only one missing from the KV slot and the first has been emitted."""
        return self.steps == 0 or self.cached < len(self.ids) - 1

    @property
    def finished(self) -> bool:
        """True once nothing more will be emitted."""
        return self.finish_reason is not None or self.cancelled

    def seen(self, path: Seq[int]) -> tuple[IntArray, IntArray]:
        """Return the distinct tokens of the text with a draft path behind it, and their counts in the output."""
        self.history.update(self.ids, self.num_prompt)
        return self.history.with_path(path)

    def cut(self, surplus: int) -> None:
        """End behind a stop string: the last `surplus` tokens were emitted behind it and don't count."""
        del self.ids[len(self.ids) - surplus :]
        self.finish_reason = FinishReason.STOP

    def emit(self, tokens: list[int]) -> list[int]:
        """Append a step's tokens, cut exactly at the end-of-sequence token or at max_tokens; return those kept."""
        kept = tokens[: self.remaining]
        for i, token in enumerate(kept):
            if token in self.eos_ids:
                kept = kept[: i + 1]
                self.finish_reason = FinishReason.STOP
                break
        self.ids += kept
        if self.finish_reason is None and self.remaining <= 0:
            self.finish_reason = FinishReason.LENGTH
        return kept
