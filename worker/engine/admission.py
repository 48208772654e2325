"""Admission: how many waiting sequences the KV memory is expected to hold until the running ones have ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from worker.engine.kv.slot_allocator import SlotAllocator
from worker.engine.output_lengths import OutputLengths
from worker.engine.segments import IntArray
from worker.engine.sequence import Sequence as EngineSequence

# A sequence that was preempted this often reserves all the memory that it can need, so that it is preempted no more.
MAX_PREEMPTIONS = 3


class Admission:
    """Expected memory of sequences, in pages."""

    def __init__(self, slots: SlotAllocator) -> None:
        """Admit to `slots`."""
        self._slots = slots
        self.lengths = OutputLengths()

    def num_fitting(self, running: Collection[EngineSequence], candidates: Sequence[EngineSequence]) -> int:
        """Return how many of `candidates`, the first ones, fit beside the running sequences; one fits if none runs."""
        everything = [*running, *candidates]
        if self._longest_tokens(everything) <= self._slots.pages * self._slots.page_tokens:
            return len(candidates)
        now, final = self._pages(everything)
        if peak_pages(now, final) <= self._slots.pages:  # as most often
            return len(candidates)
        low, high = int(not running), len(candidates) - 1
        while low < high:
            middle = (low + high + 1) // 2
            count = len(running) + middle
            if peak_pages(now[:count], final[:count]) <= self._slots.pages:
                low = middle
            else:
                high = middle - 1
        return min(low, len(candidates))

    def num_more(self, running: Sequence[EngineSequence], limit: int) -> int:
        """Return how many more sequences, like the running ones in the mean, fit beside them; `limit` if none runs."""
        if not running:
            return limit
        prompts = np.array([s.num_prompt for s in running])
        now, final = self._pages(running)
        more = int(self._slots.pages_for(int(prompts.mean()))), int(final.mean())
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            both = [np.append(pages, np.full(middle, one)) for pages, one in zip((now, final), more, strict=True)]
            if peak_pages(*both) <= self._slots.pages:
                low = middle
            else:
                high = middle - 1
        return low

    def _longest_tokens(self, sequences: Sequence[EngineSequence]) -> int:
        """Return the tokens that the pages of `sequences` hold if each has its longest output, or a few more."""
        return sum([s.num_prompt + s.max_tokens for s in sequences]) + len(sequences) * self._slots.page_tokens

    def _pages(self, sequences: Sequence[EngineSequence]) -> tuple[IntArray, IntArray]:
        """Return the pages that each sequence takes now, and those that it is expected to take when it ends."""
        length = np.array([len(s.ids) for s in sequences], np.int64)
        prompt = np.array([s.num_prompt for s in sequences], np.int64)
        max_tokens = np.array([s.max_tokens for s in sequences], np.int64)
        reserved = np.array([s.preemptions for s in sequences], np.int64) >= MAX_PREEMPTIONS
        expected = self._expected(sequences, length - prompt)
        page = self._slots.page_tokens
        now = -(-np.where(reserved, prompt + max_tokens, length) // page)
        return now, np.maximum(-(-(prompt + np.minimum(expected, max_tokens)) // page), now)

    def _expected(self, sequences: Sequence[EngineSequence], decoded: IntArray) -> IntArray:
        """Return the expected lengths of the answers of `sequences`, of which `decoded` tokens are there."""
        groups = {sequence.group for sequence in sequences}
        if len(groups) == 1:  # the usual one: of one job
            return self.lengths.expected(groups.pop(), decoded.tolist())
        members: defaultdict[Hashable, list[int]] = defaultdict(list)
        for index, sequence in enumerate(sequences):
            members[sequence.group].append(index)
        expected = np.empty_like(decoded)
        for group, some in members.items():
            expected[some] = self.lengths.expected(group, decoded[some].tolist())
        return expected


def is_reserved(sequence: EngineSequence) -> bool:
    """Return whether a sequence holds all the memory that it can need, and is not preempted."""
    return sequence.preemptions >= MAX_PREEMPTIONS


def peak_pages(now: IntArray, final: IntArray) -> int:
    """Return the most pages that sequences take together until all have ended (arXiv 2507.10150, section 3).

    They grow from `now` to `final` [n] at the same rate, and each frees its pages when it has got there.
    """
    growth = final - now
    order = np.argsort(-growth, kind="stable")
    return int((now[order].cumsum() + np.arange(1, len(order) + 1) * growth[order]).max(initial=0))
