"""Prefix sharing: which cached prefix a sequence starts from, and whose prefill it waits for.

Each sequence is looked up once, when it gets its first rows. The cost is linear in its prompt, not in other sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from typing import NamedTuple

from worker.engine.kv.prefix_tree import PrefixTree
from worker.engine.kv.slot_allocator import MIN_SHARED_PREFIX, SlotAllocator
from worker.engine.segments import PrefixCopy
from worker.engine.sequence import Sequence


class _Awaited(NamedTuple):
    """A prefill that a sequence waits for."""

    leader: Sequence  # that prefills
    length: int  # tokens, from the first
    common: int  # those of them, or fewer, that the sequence has, too


class PrefixSharing:
    """The prefixes that running sequences hold, and those that they are about to prefill."""

    def __init__(self, slots: SlotAllocator) -> None:
        """Share what `slots` hold."""
        self._slots = slots
        self._running: dict[int, Sequence] = {}  # by slot
        self._upcoming: PrefixTree[Sequence] = PrefixTree()  # prompts being prefilled, those that wait included
        self._leaders: dict[Sequence, _Awaited] = {}  # whose prefill a sequence waits for
        self._followers: defaultdict[Sequence, dict[Sequence, None]] = defaultdict(dict)
        self._copies: list[PrefixCopy] = []  # to make before the step, in this order
        self._started: list[Sequence] = []  # of these copies

    def admit(self, sequence: Sequence) -> None:
        """Take a sequence that has got a slot."""
        self._running[sequence.slot] = sequence

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence before its slot is freed; those that wait for it are looked up again."""
        self._running.pop(sequence.slot, None)
        self._upcoming.remove(sequence)
        if sequence in self._leaders:
            self._stop_waiting(sequence)
        for follower in self._followers.pop(sequence, ()):
            self._look_again(follower)

    def prefilled(self, sequence: Sequence) -> None:
        """Record that a step has prefilled `ids[:cached]` of a sequence."""
        self._slots.hold(sequence.slot, sequence.prefix_ids(sequence.cached), sequence.cached)
        if not sequence.prefilling:
            self._upcoming.remove(sequence)

    def reader(self, sequence: Sequence, selected: Container[Sequence] | None) -> tuple[Sequence, int]:
        """Return the sequence that prefills what `sequence` needs next, and the end of this part.

        That is the sequence itself, or the one whose prefill it waits for. With `selected`, only one of these.
        """
        if sequence not in self._upcoming:
            self._start(sequence, selected)
        reader, end = sequence, len(sequence.ids)
        while (awaited := self._leaders.get(reader)) is not None:
            leader, length, common = awaited
            if leader.cached < length and (selected is None or leader in selected):
                reader, end = leader, length
            else:  # the prefix is there, or is not read in this step
                self._stop_waiting(reader)
                self._copy(reader, *self._longest_cached(reader, wanted_prefix(reader), (leader.slot, common)))
                reader, end = sequence, len(sequence.ids)
        return reader, end

    def pop_copies(self) -> tuple[PrefixCopy, ...]:
        """Return the prefixes to copy before the step, in this order."""
        copies = tuple(self._copies)
        self._copies.clear()
        return copies

    def pop_started(self) -> list[Sequence]:
        """Return the sequences that have got a prefix since the last call."""
        started, self._started = self._started, []
        return started

    def _start(self, sequence: Sequence, selected: Container[Sequence] | None) -> None:
        """Copy the longest cached prefix, or wait for a longer one that is about to be prefilled."""
        end, wanted = len(sequence.ids), wanted_prefix(sequence)
        leader, length = self._upcoming.join(sequence, sequence.prefix_ids(end), end, wanted)
        cached = self._longest_cached(sequence, wanted)
        useful = max(cached[1] + 1, sequence.cached + 1, MIN_SHARED_PREFIX)
        if leader is not None and length >= useful:
            common = length
            # Do not wait for one that waits itself if its leader has almost as much.
            useful = max(useful, length - MIN_SHARED_PREFIX)
            while (above := self._leaders.get(leader)) is not None and above.length >= useful:
                leader, length, common = above.leader, above.length, min(common, above.common)
            if selected is None or leader in selected:
                self._leaders[sequence] = _Awaited(leader, length, common)
                self._followers[leader][sequence] = None
                return
        self._copy(sequence, *cached)

    def _copy(self, sequence: Sequence, source: int, length: int) -> None:
        """Start a sequence from a cached prefix that is long enough."""
        if length >= max(MIN_SHARED_PREFIX, sequence.cached + 1):
            self._copies.append(PrefixCopy(source, sequence.slot, length))
            self._started.append(sequence)
            self._slots.copy_prefix(source, sequence.slot, length)
            sequence.cached = length

    def _longest_cached(self, sequence: Sequence, wanted: int, like: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return the slot with the longest cached prefix of `ids[:wanted]` of a sequence, and its length.

        `like` has a slot whose sequence starts with the same tokens, and their number.
        """
        ids = sequence.prefix_ids(wanted)
        found = self._slots.longest_prefix(ids, wanted, like)
        if found.ends and found.length < wanted:
            ends = [self._running[slot] for slot in found.ends if slot in self._running]
            grown = [other for other in ends if other.cached > found.length]
            for other in grown:  # its output may continue like the prompt of the sequence
                self._slots.hold(other.slot, other.prefix_ids(other.cached), other.cached)
            if grown:
                found = self._slots.longest_prefix(ids, wanted)
        return next(iter(found.holders), sequence.slot), found.length

    def _stop_waiting(self, sequence: Sequence) -> None:
        leader = self._leaders.pop(sequence).leader
        del self._followers[leader][sequence]
        if not self._followers[leader]:
            del self._followers[leader]

    def _look_again(self, sequence: Sequence) -> None:
        """Look up a waiting sequence again, and those that wait for it, so that no two wait for each other."""
        del self._leaders[sequence]
        self._upcoming.remove(sequence)
        for follower in self._followers.pop(sequence, ()):
            self._look_again(follower)


def wanted_prefix(sequence: Sequence) -> int:
    """Return how many tokens of a sequence a prefix can have: the last one's row computes the logits of the next."""
    if sequence.prompt_top is None:  # the usual one
        return len(sequence.ids) - 1
    return min(len(sequence.ids) - 1, sequence.shareable)
