"""Which sequences take part in the next step: admission to KV slots, shared beginnings, prompt chunks, running ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator

from worker.engine.batch import Batch, Chunk
from worker.engine.kv.slot_allocator import SlotAllocator
from worker.engine.options import EngineOptions
from worker.engine.segments import PrefixCopy
from worker.engine.sequence import Sequence

MIN_SHARED_PREFIX = 16  # tokens: reading fewer costs no more than keeping apart who waits for whom
_OLDEST_SHARE = 4  # the oldest prompt gets at least one in so many of a step's prompt rows


class Scheduler:
    """Waiting and running sequences, and the slots they hold."""

    def __init__(self, options: EngineOptions) -> None:
        """Start empty."""
        self._options = options
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.slots = SlotAllocator(options.max_sequences, options.total_kv_tokens)

    @property
    def free_capacity(self) -> int:
        """Sequences that would be admitted at once, if they are no longer than those that wait."""
        if self._waiting and not self._fits(self._waiting[0]):
            return 0
        return max(0, self.slots.free_slots - len(self._waiting)) if self.slots.free_tokens > 0 else 0

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Everyone here, running first."""
        return (*self._running, *self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        assert self._needs(sequence) <= self.slots.tokens, "the sequence could never be admitted"
        self._waiting.append(sequence)

    def drop_finished(self) -> list[Sequence]:
        """Let finished and cancelled sequences go and free their slots; return those that held one."""
        self._waiting = deque(s for s in self._waiting if not s.finished)
        gone = [s for s in self._running if s.finished]
        self._running = [s for s in self._running if not s.finished]
        for sequence in gone:
            self.slots.free(sequence.slot, sequence.ids[: sequence.cached])
        return gone

    def next_batch(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> Batch:
        """Admit who fits, share beginnings, give prompts their rows, and return the step's work: of all, or of some."""
        while self._waiting and self._fits(self._waiting[0]):
            sequence = self._waiting.popleft()
            sequence.slot = self.slots.allocate(self._needs(sequence))
            self._running.append(sequence)
        taking_part = [s for s in self._running if only is None or s.key in only]
        order = _fair_order([s for s in taking_part if s.prefilling])
        starting, shares = self._start(order)
        chunks = tuple(self._chunks([s for s in order if s.prefilling and s in starting]))
        decoding = tuple(s for s in taking_part if not s.prefilling)
        return Batch(chunks, decoding, tuple(shares), self.slots.pop_evicted(), plain)

    def _fits(self, sequence: Sequence) -> bool:
        return self.slots.can_allocate(self._needs(sequence))

    def _needs(self, sequence: Sequence) -> int:
        """Return the KV entries that a sequence may come to need: all its text and one tree."""
        return sequence.max_length + self._options.nodes + 1

    def _start(self, order: list[Sequence]) -> tuple[set[Sequence], list[PrefixCopy]]:
        """Return who may read its prompt in this step, and the beginnings that are copied before."""
        ready: set[Sequence] = set()
        shares: list[PrefixCopy] = []
        for place, sequence in enumerate(order):
            if not sequence.cached:
                source, length = self._longest_beginning(sequence)
                # Somebody before it is about to read more of the same: it reads that, and this one copies it then.
                coming = max((common_prefix_length(s.ids, sequence.ids[:-1]) for s in order[:place]), default=0)
                if coming >= MIN_SHARED_PREFIX and coming > length:
                    continue
                if length >= MIN_SHARED_PREFIX:
                    shares.append(PrefixCopy(source, sequence.slot, length))
                    self.slots.drop_prefix(sequence.slot)
                    sequence.cached = length
            ready.add(sequence)
        return ready, shares

    def _longest_beginning(self, sequence: Sequence) -> tuple[int, int]:
        """Return the slot that holds the longest beginning of a text, and its length.

        The last token is never part of it: somebody has to ask the model what follows.
        """
        wanted = sequence.ids[:-1]
        held = self.slots.cached_prefixes | {s.slot: s.ids[: s.cached] for s in self._running if s.cached}
        lengths = {slot: common_prefix_length(text, wanted) for slot, text in held.items()}
        source = max(lengths, key=lambda slot: (lengths[slot], slot == sequence.slot), default=sequence.slot)
        return source, lengths.get(source, 0)

    def _chunks(self, reading: list[Sequence]) -> Iterator[Chunk]:
        """Give out the step's prompt rows: some to the oldest, then the shortest, what is left to the oldest."""
        rows = self._options.prefill_rows
        given: dict[Sequence, int] = {}
        for sequence in reading:
            most = rows if given else max(1, rows // _OLDEST_SHARE)
            given[sequence] = min(len(sequence.ids) - sequence.cached, most)
            rows -= given[sequence]
        for sequence in reading[:1]:
            given[sequence] += min(len(sequence.ids) - sequence.cached - given[sequence], rows)
        for sequence, count in given.items():
            if count:
                self.slots.drop_prefix(sequence.slot)
                end = sequence.cached + count
                yield Chunk(sequence, end, completes=end == len(sequence.ids))


def common_prefix_length(a: list[int], b: list[int]) -> int:
    """Return how many tokens two texts have in common from their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _fair_order(reading: list[Sequence]) -> list[Sequence]:
    """Return the oldest, so that it gets on, then those with the least left to read: a long text holds up none."""
    return reading[:1] + sorted(reading[1:], key=lambda s: len(s.ids) - s.cached)
