"""Choose the work of the next step: admit sequences to KV slots, share prefixes, and split prompts into chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator

from worker.engine.batch import Batch, Chunk
from worker.engine.kv.slot_allocator import SlotAllocator
from worker.engine.options import EngineOptions
from worker.engine.segments import PrefixCopy
from worker.engine.sequence import Sequence

MIN_SHARED_PREFIX = 16  # tokens: prefilling a shorter prefix is cheaper than waiting for another sequence to prefill it
_OLDEST_SHARE = 4  # the oldest prompt gets at least one in this many of a step's prompt rows


class Scheduler:
    """Waiting and running sequences, and their KV slots."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.slots = SlotAllocator(options.max_sequences, options.total_kv_tokens)

    @property
    def free_capacity(self) -> int:
        """Number of sequences that would be admitted at once, if they are no longer than the waiting ones."""
        if self._waiting and not self._fits(self._waiting[0]):
            return 0
        return max(0, self.slots.free_slots - len(self._waiting)) if self.slots.free_tokens > 0 else 0

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, running ones first."""
        return (*self._running, *self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        assert self._needs(sequence) <= self.slots.tokens, "the sequence needs more KV memory than there is"
        self._waiting.append(sequence)

    def drop_finished(self) -> list[Sequence]:
        """Remove finished and cancelled sequences and free their slots; return those that had one."""
        self._waiting = deque(s for s in self._waiting if not s.finished)
        finished = [s for s in self._running if s.finished]
        self._running = [s for s in self._running if not s.finished]
        for sequence in finished:
            self.slots.free(sequence.slot, sequence.ids[: sequence.cached])
        return finished

    def next_batch(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> Batch:
        """Admit waiting sequences in order, share prefixes, and return the step's work.

        The step is of all sequences, or of those whose keys are in `only`.
        """
        while self._waiting and self._fits(self._waiting[0]):
            sequence = self._waiting.popleft()
            sequence.slot = self.slots.allocate(self._needs(sequence))
            self._running.append(sequence)
        selected = [s for s in self._running if only is None or s.key in only]
        order = _fair_order([s for s in selected if s.prefilling])
        ready, copies = self._share_prefixes(order)
        chunks = tuple(self._chunks([s for s in order if s.prefilling and s in ready]))
        decoding = tuple(s for s in selected if not s.prefilling)
        return Batch(chunks, decoding, tuple(copies), self.slots.pop_evicted(), plain)

    def _fits(self, sequence: Sequence) -> bool:
        return self.slots.can_allocate(self._needs(sequence))

    def _needs(self, sequence: Sequence) -> int:
        """Return the max KV entries of a sequence: all its tokens and one tree."""
        return sequence.max_length + self._options.nodes + 1

    def _share_prefixes(self, order: list[Sequence]) -> tuple[set[Sequence], list[PrefixCopy]]:
        """Return the sequences that may prefill in this step, and the prefixes to copy before it."""
        ready: set[Sequence] = set()
        copies: list[PrefixCopy] = []
        for index, sequence in enumerate(order):
            if not sequence.cached:
                source, length = self._longest_cached_prefix(sequence)
                # If an earlier sequence is about to prefill a longer common prefix, wait and copy it then.
                upcoming = max((common_prefix_length(s.ids, sequence.ids[:-1]) for s in order[:index]), default=0)
                if upcoming >= MIN_SHARED_PREFIX and upcoming > length:
                    continue
                if length >= MIN_SHARED_PREFIX:
                    copies.append(PrefixCopy(source, sequence.slot, length))
                    self.slots.drop_prefix(sequence.slot)
                    sequence.cached = length
            ready.add(sequence)
        return ready, copies

    def _longest_cached_prefix(self, sequence: Sequence) -> tuple[int, int]:
        """Return the slot with the longest cached prefix of a sequence, and its length.

        The last token is never part of it: its row computes the logits of the next token.
        """
        wanted = sequence.ids[:-1]
        cached = self.slots.cached_prefixes | {s.slot: s.ids[: s.cached] for s in self._running if s.cached}
        lengths = {slot: common_prefix_length(ids, wanted) for slot, ids in cached.items()}
        source = max(lengths, key=lambda slot: (lengths[slot], slot == sequence.slot), default=sequence.slot)
        return source, lengths.get(source, 0)

    def _chunks(self, prefilling: list[Sequence]) -> Iterator[Chunk]:
        """Divide the prompt rows: a share to the oldest prompt, then to the shortest ones, the rest to the oldest."""
        rows = self._options.prefill_rows
        given: dict[Sequence, int] = {}
        for sequence in prefilling:
            limit = rows if given else max(1, rows // _OLDEST_SHARE)
            given[sequence] = min(len(sequence.ids) - sequence.cached, limit)
            rows -= given[sequence]
        for sequence in prefilling[:1]:
            given[sequence] += min(len(sequence.ids) - sequence.cached - given[sequence], rows)
        for sequence, count in given.items():
            if count:
                self.slots.drop_prefix(sequence.slot)
                end = sequence.cached + count
                yield Chunk(sequence, end, completes=end == len(sequence.ids))


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """Return the number of leading tokens that two sequences have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _fair_order(prefilling: list[Sequence]) -> list[Sequence]:
    """Return the oldest, which must not starve, then the others, shortest first: a long prompt delays no other."""
    return prefilling[:1] + sorted(prefilling[1:], key=lambda s: len(s.ids) - s.cached)
