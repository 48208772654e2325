"""A sequence: one choice of one request while it is decoded, as token ids."""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields
from enum import StrEnum
from itertools import count
from typing import Any

from worker.engine.grammar.grammar import Grammar
from worker.engine.sampling.parameters import Bias, Sampling, bias_of
from worker.engine.sampling.penalties import TokenCounts
from worker.engine.segments import IntArray, TokenIds
from worker.engine.token_logprobs import TokenLogprobs


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or a full context


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt, tokens so far, and how many of them have KV entries.

    To resume a sequence, create it with the prompt and the tokens already emitted. With the same sampling it continues
    as if it had never stopped, because the noise is keyed by position.
    """

    key: Hashable
    ids: list[int]  # prompt, then output
    num_prompt: int
    max_tokens: int
    sampling: Sampling
    eos_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None  # binds the output; None: all tokens are allowed
    long: bool = False  # it has the long factors of longrope
    drafts: bool = True  # False: decode it plainly, apart from its batch; its text is the same
    group: Hashable = None  # sequences of one group may draft from each other's text; None: from no other
    slot: int = -1  # KV slot; -1: not admitted
    cached: int = 0  # leading ids with KV entries in the slot
    steps: int = 0  # decoding steps so far; the token from prefill is step 0
    traced_steps: int = 0  # the first steps return their trees
    prompt_top: int | None = None  # most likely tokens to report beside each prompt token; None: report neither
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's tokens but the first, so far
    prefill_ms: float = 0.0  # time of prefill chunks since the last emitted token
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    failure: str = ""  # why the engine gave it up
    preemptions: int = 0  # how often its KV memory was taken
    computed: int = 0  # leading ids that had KV entries when it was last preempted
    new_preemptions: int = 0  # since the last emitted token, as is the next
    recomputed_tokens: int = 0  # ids whose KV entries were computed again after a preemption
    packed: TokenIds | None = None  # `ids`, or the first of them; `packed_ids` adds the others
    open_bias: Bias | None = None  # cached by `bias`
    history: TokenCounts = field(default_factory=TokenCounts)  # token counts for penalties
    number: int = field(default_factory=count().__next__)  # in results; no other sequence of this process has it

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
        """Max tokens of prompt and output together."""
        return self.num_prompt + self.max_tokens

    @property
    def prefilling(self) -> bool:
        """True until the first token is emitted and all but the newest have KV entries."""
        return self.steps == 0 or self.cached < len(self.ids) - 1

    @property
    def shareable(self) -> int:
        """Leading ids whose KV entries may come from another sequence: not those whose logits are still to be read."""
        if self.prompt_top is None or len(self.prompt_logprobs) >= self.num_prompt - 1:
            return len(self.ids)
        return len(self.prompt_logprobs)

    def packed_ids(self, end: int) -> TokenIds:
        """Return `ids[:end]`, which more may follow, as an array. The caller does not change it."""
        packed = self.packed
        if packed is None:
            packed = self.packed = array("i", self.ids)
        elif len(packed) < end:
            packed.fromlist(self.ids[len(packed) :])
        return packed

    def prefix_ids(self, end: int) -> TokenIds:
        """Return `packed_ids` for a lookup of prefixes; that of a long text differs from all others at its first token.

        Keys of the same tokens with other factors of longrope are other keys.
        """
        packed = self.packed_ids(end)
        if not self.long:
            return packed
        marked = packed[:]
        marked[0] = ~marked[0]  # no token id is negative
        return marked

    def cut(self, length: int) -> None:
        """Forget all ids but the first `length`, and what was counted of them."""
        del self.ids[length:]
        self.packed = None
        self.history = TokenCounts()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the ids as one piece, and of the other fields those that differ from their defaults."""
        values = ((name, getattr(self, name)) for name in _DEFAULTS)
        others = {name: value for name, value in values if value != _DEFAULTS[name]}
        return _received, (self.packed_ids(len(self.ids)).tobytes(), others, self.prompt_logprobs, self.number)

    def scored(self, start: int, end: int) -> range:
        """Return the positions from `start` to `end` whose logits are read for log-probabilities of the prompt."""
        if self.prompt_top is None:
            return range(0)
        return range(max(start, len(self.prompt_logprobs)), min(end, self.num_prompt - 1))

    @property
    def finished(self) -> bool:
        """True when nothing more will be emitted."""
        return self.finish_reason is not None or self.cancelled

    def bias(self, position: int) -> Bias:
        """Return what is added to the logits of the token at a position: -inf for one that would end it too early."""
        if position >= self.num_prompt + self.sampling.min_tokens or not self.eos_ids:
            return self.sampling.bias
        if self.open_bias is None:
            self.open_bias = bias_of(dict(self.sampling.logit_bias) | dict.fromkeys(sorted(self.eos_ids), -math.inf))
        return self.open_bias

    def seen(self, path: Seq[int]) -> tuple[IntArray, IntArray]:
        """Return the distinct tokens of the sequence followed by a draft path, and their counts in the output."""
        self.history.update(self.ids, self.num_prompt)
        return self.history.with_path(path)

    def preempt(self) -> None:
        """Give up the slot; decoding continues from the same ids later."""
        self.computed = max(self.computed, self.cached)
        self.slot, self.cached = -1, 0
        self.preemptions += 1
        self.new_preemptions += 1

    def emit(self, tokens: list[int]) -> list[int]:
        """Append a step's tokens up to the end-of-sequence token or `max_tokens`; return those appended."""
        if len(tokens) < self.remaining and self.eos_ids.isdisjoint(tokens):  # the usual step: nothing ends
            self.ids += tokens
            return tokens
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


# Fields that are pickled by name, and their defaults; the token counts and the cached bias are computed again.
_APART = ("ids", "packed", "open_bias", "prompt_logprobs", "history", "number")
_DEFAULTS = {field.name: field.default for field in fields(Sequence) if field.name not in _APART}


def _received(packed: bytes, others: Mapping[str, Any], prompt_logprobs: list[TokenLogprobs], number: int) -> Sequence:
    """Return the sequence that was pickled."""
    ids = array("i", packed)
    return Sequence(ids=ids.tolist(), packed=ids, prompt_logprobs=prompt_logprobs, number=number, **others)
