"""Choose the work of the next step: admit sequences, give them KV pages, share prefixes, split prompts into chunks.

A prompt gets its pages when it is admitted, an output as it grows. When none is left, cached prefixes are evicted
first, then the step has fewer draft rows, then the running sequence with the least lost work is preempted: it waits,
and continues from its tokens later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator
from functools import partial
from itertools import chain, count
from operator import is_not

from worker.engine.admission import Admission, is_reserved
from worker.engine.batch import Batch, Chunk
from worker.engine.errors import SequenceTooLong
from worker.engine.kv.slot_allocator import SlotAllocator, Truncation
from worker.engine.options import MAX_STEP_NODES, EngineOptions
from worker.engine.prefix_sharing import PrefixSharing, wanted_prefix
from worker.engine.priority_queue import PriorityQueue
from worker.engine.sequence import Sequence

_OLDEST_SHARE = 4  # the oldest prompt gets at least one in this many of a step's prompt rows
_FIRST_CANDIDATES = 64  # waiting sequences whose admission is decided together; if all fit, four times as many next
_RECHECK_STEPS = 16  # steps after which what fits is computed again although no sequence has ended


class Scheduler:
    """Waiting and running sequences, and their KV slots. A step costs nothing for a prompt that only waits.

    Every sequence ends: the oldest waiting one is admitted first, the oldest running one is preempted only if all
    others are reserved, and one that was preempted `MAX_PREEMPTIONS` times reserves all its memory when it is admitted
    again.
    """

    def __init__(self, options: EngineOptions) -> None:
        """Start empty."""
        self._options = options
        self._arrivals = count()
        self._arrived: dict[Sequence, int] = {}
        self._by_key: defaultdict[Hashable, list[Sequence]] = defaultdict(list)
        self._waiting: PriorityQueue[Sequence] = PriorityQueue()  # the oldest first
        self._running: dict[Sequence, None] = {}  # in the order of their admission, as are the next
        self._prefilling: dict[Sequence, None] = {}  # running ones
        self._by_unread: PriorityQueue[Sequence] = PriorityQueue()  # the same, the shortest first
        self._decoding: dict[Sequence, int] = {}  # the other running ones; tokens that their pages hold, or fewer
        self._chunks: list[Chunk] = []  # of the last step
        self._preempted: list[Sequence] = []  # in this step
        self._recheck_in = 0  # steps until admission is tried again after memory was short
        self._capacity: int | None = None  # what `free_capacity` returned; None: something has changed
        self._capacity_steps = 0  # since it was computed
        self.slots = SlotAllocator(options.max_sequences, options.total_kv_tokens, options.page_tokens)
        self._admission = Admission(self.slots)
        self._sharing = PrefixSharing(self.slots)

    @property
    def free_capacity(self) -> int:
        """Number of sequences that would be admitted at once, if they are like the running ones.

        One more, if there is a slot: it waits at hand until there is memory.
        """
        if self._recheck_in and len(self._waiting):
            return 0
        if self._capacity is None:
            fitting = self._admission.num_more(list(self._running), self.slots.free_slots)
            self._capacity = max(fitting, min(1, self.slots.free_slots))
        return max(0, self._capacity - len(self._waiting))

    @property
    def busy(self) -> bool:
        """True while there is a sequence."""
        return bool(self._by_key)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, running ones first."""
        return (*self._running, *self._waiting)

    def of(self, keys: Iterable[Hashable]) -> list[Sequence]:
        """Return the sequences with these keys."""
        return [sequence for key in keys for sequence in self._by_key.get(key, ())]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises SequenceTooLong if the KV memory can't hold it even alone."""
        if self.slots.pages_for(sequence.max_length) > self.slots.pages:
            raise SequenceTooLong(
                f"the prompt and max_tokens need {sequence.max_length} tokens of KV memory, and "
                f"{self.slots.pages * self.slots.page_tokens} fit; set BASIC_KV_TOKENS higher or max_tokens lower"
            )
        self._by_key[sequence.key].append(sequence)
        self._arrived[sequence] = next(self._arrivals)
        self._waiting.push(sequence, self._arrived[sequence])

    def drop_finished(self, candidates: Iterable[Sequence]) -> list[Sequence]:
        """Remove those that are finished or cancelled and free their slots; return those that had one."""
        dropped = []
        for sequence in candidates:
            if not sequence.finished or sequence not in self._arrived:
                continue
            del self._arrived[sequence]
            self._by_key[sequence.key].remove(sequence)
            if not self._by_key[sequence.key]:
                del self._by_key[sequence.key]
            if sequence in self._waiting:
                self._waiting.discard(sequence)
            else:
                self._admission.lengths.learn(sequence.group, len(sequence.ids) - sequence.num_prompt)
                self._free(sequence)
                dropped.append(sequence)
            self._recheck_in, self._capacity = 0, None
        return dropped

    def next_batch(self, only: Collection[Hashable] | None = None, *, plain: bool = False) -> Batch:
        """Admit waiting sequences in order, share prefixes, and return the step's work.

        The step is of all sequences, or of those whose keys are in `only`.
        """
        self._update_prefilling()
        selected = None if only is None else set(self.of(only))
        self._grow_outputs(selected)
        self._admit()
        self._chunks = self._next_chunks(selected)
        decoding = tuple(self._decoding if selected is None else (s for s in self._decoding if s in selected))
        preempted, self._preempted = tuple(self._preempted), []
        scored = sum(len(chunk.scored) for chunk in self._chunks if chunk.sequence.prompt_top is not None)
        return Batch(
            chunks=tuple(self._chunks),
            decoding=decoding,
            prefix_copies=self._sharing.pop_copies(),
            truncations=tuple(self.slots.pop_truncations()),
            preempted=preempted,
            draft_rows=min(self.slots.available_pages, MAX_STEP_NODES - scored),
            plain=plain,
        )

    def grow_trees(self, sequences: Iterable[Sequence], nodes: Iterable[int]) -> list[Truncation]:
        """Take pages for the draft nodes of each sequence, at most `draft_rows`; return the memory to free before."""
        for sequence, number in zip(sequences, nodes, strict=True):
            if number:
                grown = self.slots.grow(sequence.slot, len(sequence.ids) + number)
                assert grown, "the step has more draft nodes than pages"
        return self.slots.pop_truncations()

    def _admit(self) -> None:
        """Admit waiting sequences in order, as many as are expected to fit until the running ones have ended."""
        self._capacity_steps += 1
        if self._capacity_steps >= _RECHECK_STEPS:
            self._capacity, self._capacity_steps = None, 0
        if self._recheck_in:
            self._recheck_in -= 1
        at_once = _FIRST_CANDIDATES
        while not self._recheck_in and len(self._waiting) and self.slots.free_slots:
            candidates = self._waiting.pop(min(self.slots.free_slots, at_once))
            at_once *= 4
            fitting = self._admission.num_fitting(list(self._running), candidates)
            for index, sequence in enumerate(candidates):
                if index >= fitting or not self._start(sequence):
                    self._recheck_in = _RECHECK_STEPS
                    for other in candidates[index:]:
                        self._waiting.push(other, self._arrived[other])
                    break

    def _start(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and the pages of its tokens; return False if there are too few."""
        length = sequence.max_length if is_reserved(sequence) else len(sequence.ids)
        if self.slots.pages_for(length) > self.slots.available_pages:
            return False
        end = wanted_prefix(sequence)
        sequence.slot, sequence.cached = self.slots.allocate(sequence.prefix_ids(end), end)
        self.slots.grow(sequence.slot, length)
        self._sharing.admit(sequence)
        self._running[sequence] = None
        self._prefilling[sequence] = None
        self._by_unread.push(sequence, _unread(sequence))
        self._capacity = None
        return True

    def _grow_outputs(self, selected: set[Sequence] | None) -> None:
        """Take a page for the newest token of each decoding sequence that needs one; preempt others if none is left."""
        if self.slots.available_pages < MAX_STEP_NODES + len(self._running):
            self._reclaim()
        for sequence in [s for s, held in self._decoding.items() if len(s.ids) > held]:
            if selected is not None and sequence not in selected:
                continue
            while sequence.slot >= 0 and not self.slots.grow(sequence.slot, len(sequence.ids)):
                self._preempt(self._victim())
            if sequence.slot >= 0:
                self._decoding[sequence] = self.slots.pages_for(len(sequence.ids)) * self.slots.page_tokens

    def _reclaim(self) -> None:
        """Free what the trees of earlier steps have left behind the texts."""
        for sequence in self._running:
            if not is_reserved(sequence):
                self.slots.shrink(sequence.slot, len(sequence.ids))

    def _victim(self) -> Sequence:
        """Return the running sequence to preempt: the one that loses the least work; the oldest only if it must be."""
        candidates = [s for s in self._running if not is_reserved(s)]
        oldest = min(candidates, key=self._arrived.__getitem__)
        others = [s for s in candidates if s is not oldest]
        return min(others, key=lambda s: (self._lost_tokens(s), -self._arrived[s]), default=oldest)

    def _lost_tokens(self, sequence: Sequence) -> int:
        """Return the tokens that a sequence would have to prefill again: those that no other slot holds."""
        return max(0, sequence.cached - self.slots.shared_length(sequence.slot))

    def _preempt(self, sequence: Sequence) -> None:
        """Take the slot of a running sequence. Its entries stay cached until their pages are needed."""
        self._preempted.append(sequence)
        self._free(sequence)
        sequence.preempt()
        self._waiting.push(sequence, self._arrived[sequence])
        self._recheck_in, self._capacity = _RECHECK_STEPS, None

    def _free(self, sequence: Sequence) -> None:
        """Free the slot of a running sequence."""
        self._decoding.pop(sequence, None)
        del self._running[sequence]
        self._prefilling.pop(sequence, None)
        self._by_unread.discard(sequence)
        self._sharing.drop(sequence)
        self.slots.free(sequence.slot, sequence.prefix_ids(sequence.cached), sequence.cached)

    def _update_prefilling(self) -> None:
        """Record what the last step has prefilled."""
        for sequence, _, _ in self._chunks:
            if sequence not in self._prefilling:  # it was finished or cancelled
                continue
            self._sharing.prefilled(sequence)
            if sequence.prefilling:
                self._by_unread.push(sequence, _unread(sequence))
            else:
                del self._prefilling[sequence]
                self._by_unread.discard(sequence)
                self._decoding[sequence] = self.slots.pages_of(sequence.slot) * self.slots.page_tokens
        self._chunks = []

    def _next_chunks(self, selected: set[Sequence] | None) -> list[Chunk]:
        """Divide the prompt rows: a share to the oldest prompt, then to the shortest ones, the rest to the first.

        A sequence that waits for a prefix which another one prefills has its rows given to that one. A step keeps the
        logits of MAX_STEP_NODES rows beside those of the sequences, of prompt tokens or of draft nodes: that bounds
        its memory.
        """
        if not self._prefilling:
            return []
        rows, scores = self._options.prefill_rows, MAX_STEP_NODES
        given: dict[Sequence, int] = {}  # ends of chunks
        reader_of = self._sharing.reader
        for sequence in self._in_order(selected):
            reader, end = reader_of(sequence, selected)
            start = given.get(reader, reader.cached)
            limit = start + (rows if given else max(1, rows // _OLDEST_SHARE))
            if end > limit:
                end = limit
            if reader.prompt_top is not None:
                end = _scorable(reader, start, end, scores)
            if end > start:
                given[reader] = end
                rows -= end - start
                if reader.prompt_top is not None:
                    scores -= len(reader.scored(start, end))
                if rows <= 0:
                    break
        for sequence in self._sharing.pop_started():
            if sequence not in given:  # the others are pushed when their chunks have been prefilled
                self._by_unread.push(sequence, _unread(sequence))
        for sequence in [*given][:1]:
            start = given[sequence]
            given[sequence] = _scorable(sequence, start, min(len(sequence.ids), start + rows), scores)
        return [Chunk(sequence, end, end == len(sequence.ids)) for sequence, end in given.items()]

    def _in_order(self, selected: set[Sequence] | None) -> Iterator[Sequence]:
        """Return the first admitted, which must not starve, then the others, shortest first: a long one delays none."""
        if selected is not None:
            some = [s for s in self._prefilling if s in selected]
            return iter([*some[:1], *sorted(some[1:], key=_unread)])
        oldest = next(iter(self._prefilling))
        return chain((oldest,), filter(partial(is_not, oldest), self._by_unread))


def _scorable(sequence: Sequence, start: int, end: int, limit: int) -> int:
    """Return the end of a chunk from `start` to at most `end` with at most `limit` scored rows."""
    if sequence.prompt_top is None:
        return end
    scored = sequence.scored(start, end)
    return end if len(scored) <= limit else scored.start + limit


def _unread(sequence: Sequence) -> int:
    """Return how many tokens of a sequence have no KV entries."""
    return len(sequence.ids) - sequence.cached
