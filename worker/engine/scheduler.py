"""Choose the work of the next step: admit sequences to KV slots, share prefixes, and split prompts into chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator

from worker.engine.batch import Batch, Chunk
from worker.engine.kv.slot_allocator import SlotAllocator
from worker.engine.options import EngineOptions
from worker.engine.prefix_sharing import PrefixSharing
from worker.engine.priority_queue import PriorityQueue
from worker.engine.sequence import Sequence

_OLDEST_SHARE = 4  # the oldest prompt gets at least one in this many of a step's prompt rows


class Scheduler:
    """Waiting and running sequences, and their KV slots. A step costs nothing for a prompt that only waits."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._by_key: defaultdict[Hashable, list[Sequence]] = defaultdict(list)
        self._waiting: dict[Sequence, None] = {}
        self._prefilling: dict[Sequence, None] = {}  # running ones, the oldest first
        self._by_unread: PriorityQueue[Sequence] = (
            PriorityQueue()
        )  # the same, those with the fewest tokens to read first
        self._decoding: dict[Sequence, None] = {}
        self._chunks: list[Chunk] = []  # of the last step
        self.slots = SlotAllocator(options.max_sequences, options.total_kv_tokens)
        self._sharing = PrefixSharing(self.slots)

    @property
    def free_capacity(self) -> int:
        """Number of sequences that would be admitted at once, if they are no longer than the waiting ones."""
        if self._waiting and not self._fits(next(iter(self._waiting))):
            return 0
        return max(0, self.slots.free_slots - len(self._waiting)) if self.slots.free_tokens > 0 else 0

    @property
    def busy(self) -> bool:
        """True while there is a sequence."""
        return bool(self._by_key)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, running ones first."""
        return (*self._decoding, *self._prefilling, *self._waiting)

    def of(self, keys: Iterable[Hashable]) -> list[Sequence]:
        """Return the sequences with these keys."""
        return [sequence for key in keys for sequence in self._by_key.get(key, ())]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        assert self._needs(sequence) <= self.slots.tokens, "the sequence needs more KV memory than there is"
        self._by_key[sequence.key].append(sequence)
        self._waiting[sequence] = None

    def drop_finished(self, candidates: Iterable[Sequence]) -> list[Sequence]:
        """Remove those that are finished or cancelled and free their slots; return those that had one."""
        dropped = []
        for sequence in candidates:
            if not sequence.finished or sequence not in self._by_key.get(sequence.key, ()):
                continue
            self._by_key[sequence.key].remove(sequence)
            if not self._by_key[sequence.key]:
                del self._by_key[sequence.key]
            if sequence in self._waiting:
                del self._waiting[sequence]
            else:
                self._free(sequence)
                dropped.append(sequence)
        return dropped

    def next_batch(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> Batch:
        """Admit waiting sequences in order, share prefixes, and return the step's work.

        The step is of all sequences, or of those whose keys are in `only`.
        """
        self._update_prefilling()
        self._admit()
        selected = None if only is None else set(self.of(only))
        self._chunks = self._next_chunks(selected)
        decoding = tuple(self._decoding if selected is None else (s for s in self._decoding if s in selected))
        return Batch(tuple(self._chunks), decoding, self._sharing.pop_copies(), self.slots.pop_evicted(), plain)

    def _admit(self) -> None:
        admitted = []
        for sequence in self._waiting:
            if not self._fits(sequence):
                break
            sequence.slot = self.slots.allocate(self._needs(sequence))
            admitted.append(sequence)
        for sequence in admitted:
            del self._waiting[sequence]
            self._sharing.admit(sequence)
            self._prefilling[sequence] = None
            self._by_unread.push(sequence, _unread(sequence))

    def _fits(self, sequence: Sequence) -> bool:
        return self.slots.can_allocate(self._needs(sequence))

    def _needs(self, sequence: Sequence) -> int:
        """Return the max KV entries of a sequence: all its tokens and one tree."""
        return sequence.max_length + self._options.nodes + 1

    def _free(self, sequence: Sequence) -> None:
        """Free the slot of a running sequence."""
        self._decoding.pop(sequence, None)
        self._prefilling.pop(sequence, None)
        self._by_unread.discard(sequence)
        self._sharing.drop(sequence)
        self.slots.free(sequence.slot, sequence.ids, sequence.cached)

    def _update_prefilling(self) -> None:
        """Record what the last step has prefilled."""
        for chunk in self._chunks:
            sequence = chunk.sequence
            if sequence not in self._prefilling:  # it was finished or cancelled
                continue
            self._sharing.prefilled(sequence)
            if sequence.prefilling:
                self._by_unread.push(sequence, _unread(sequence))
            else:
                del self._prefilling[sequence]
                self._by_unread.discard(sequence)
                self._decoding[sequence] = None

    def _next_chunks(self, selected: set[Sequence] | None) -> list[Chunk]:
        """Divide the prompt rows: a share to the oldest prompt, then to the shortest ones, the rest to the first.

        A sequence that waits for a prefix which another one prefills has its rows given to that one.
        """
        rows = self._options.prefill_rows
        given: dict[Sequence, int] = {}  # ends of chunks
        for sequence in self._in_order(selected):
            reader, end = self._sharing.reader(sequence, selected)
            start = given.get(reader, reader.cached)
            end = min(end, start + (rows if given else max(1, rows // _OLDEST_SHARE)))
            if end > start:
                given[reader] = end
                rows -= end - start
            if rows <= 0:
                break
        for sequence in [*given][:1]:
            given[sequence] += min(len(sequence.ids) - given[sequence], rows)
        for sequence in given:
            self.slots.drop_left(sequence.slot)
        return [Chunk(sequence, end, completes=end == len(sequence.ids)) for sequence, end in given.items()]

    def _in_order(self, selected: set[Sequence] | None) -> Iterator[Sequence]:
        """Yield the oldest, which must not starve, then the others, shortest first: a long prompt delays no other."""
        if selected is not None:
            some = [s for s in self._prefilling if s in selected]
            yield from some[:1]
            yield from sorted(some[1:], key=_unread)
            return
        oldest = next(iter(self._prefilling), None)
        if oldest is None:
            return
        seen = [oldest]
        self._by_unread.discard(oldest)
        try:
            yield oldest
            while (shortest := self._by_unread.first()) is not None:
                self._by_unread.discard(shortest)
                seen.append(shortest)
                yield shortest
        finally:
            for sequence in seen:
                self._by_unread.push(sequence, _unread(sequence))


def _unread(sequence: Sequence) -> int:
    """Return how many tokens of a sequence have no KV entries."""
    return len(sequence.ids) - sequence.cached
