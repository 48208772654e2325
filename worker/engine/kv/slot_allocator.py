"""Allocation of KV slots and pages: which slots are free, how many pages each takes, and which prefixes they hold.

It only counts; the keys and values are in the `KvStore`. A page is what a store allocates at once. Each slot's pages
count, as if no two slots shared any, so that the count holds for every memory layout.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from worker.engine.errors import OutOfSlots
from worker.engine.kv.prefix_tree import Match, PrefixTree
from worker.engine.segments import TokenIds

MIN_SHARED_PREFIX = 16  # tokens: prefilling a shorter prefix is cheaper than sharing it
_MIN_EVICTED_TOKENS = 64  # evicting less at a time costs more calls than it keeps

Truncation = tuple[int, int]  # slot, entries that stay


class SlotAllocator:
    """Slots 0..count-1 that share memory for `tokens` tokens: `free_pages + used_pages == pages` at any time.

    A slot takes pages as its sequence grows. A free slot keeps the entries of its last sequence as a cached prefix, for
    sequences that start with the same tokens, until the pages are needed.
    """

    def __init__(self, count: int, tokens: int, page_tokens: int = 1) -> None:
        """Start with every slot free and empty."""
        self.count = count
        self.page_tokens = page_tokens
        self.pages = tokens // page_tokens
        self._used_pages = self._cached_pages = 0
        self._pages_of = [0] * count  # by slot
        self._held: PrefixTree[int] = PrefixTree()  # token ids with KV entries, by slot
        self._in_use: set[int] = set()
        self._empty = list(range(count))  # free slots without a cached prefix, as a heap
        self._cached: dict[int, int] = {}  # length of the cached prefix by free slot, the least recently used first
        self._truncations: list[Truncation] = []
        heapify(self._empty)

    @property
    def free_slots(self) -> int:
        """Number of slots without a sequence."""
        return self.count - len(self._in_use)

    @property
    def used_pages(self) -> int:
        """Pages that slots take, cached prefixes included."""
        return self._used_pages

    @property
    def free_pages(self) -> int:
        """Pages that no slot takes."""
        return self.pages - self._used_pages

    @property
    def available_pages(self) -> int:
        """Pages that no running sequence takes: they are free, or hold cached prefixes."""
        return self.pages - self._used_pages + self._cached_pages

    def pages_for(self, entries: int) -> int:
        """Return the pages that this many KV entries of one slot take."""
        return -(-entries // self.page_tokens)

    def pages_of(self, slot: int) -> int:
        """Return the pages that a slot takes."""
        return self._pages_of[slot]

    def longest_prefix(self, ids: TokenIds, end: int, like: tuple[int, int] | None = None) -> Match[int]:
        """Return the longest prefix of `ids[:end]` that slots hold.

        With `like`, a slot and a length, its sequence starts with the same tokens, which are not compared again.
        """
        return self._held.longest(ids, end, like)

    def shared_length(self, slot: int) -> int:
        """Return how many of the first entries of a slot another one holds, too."""
        return self._held.shared_length(slot)

    def allocate(self, ids: TokenIds, end: int) -> tuple[int, int]:
        """Take a slot for a sequence; return it, and the length of its prefix `ids[:end]` that is in it already.

        Take a slot whose cached prefix is of use as a whole, else the lowest empty one, else the one with the longest
        prefix of the sequence, else the least recently used. Raises OutOfSlots.
        """
        if not self.free_slots:
            raise OutOfSlots
        if not self._cached:
            slot = heappop(self._empty)
            self._in_use.add(slot)
            return slot, 0
        found = self._held.longest(ids, end)
        length = found.length if found.length >= MIN_SHARED_PREFIX else 0
        cached = next((slot for slot in found.ends if slot in self._cached), None) if length else None
        if cached is None and self._empty:
            slot = heappop(self._empty)
            self._in_use.add(slot)
            self._touch(found)
            return slot, 0
        if cached is None and length:
            cached = next((slot for slot in found.holders if slot in self._cached), None)
        if cached is None:
            slot, length = next(iter(self._cached)), 0
            self._touch(found)
        else:
            slot = cached
        self._cut(slot, length)
        self._cached_pages -= self._pages_of[slot]
        del self._cached[slot]
        self._in_use.add(slot)
        return slot, length

    def grow(self, slot: int, entries: int) -> bool:
        """Let a slot in use have pages for `entries` entries; evict the oldest cached prefixes if there are too few.

        Return False, with nothing changed, if that is not enough.
        """
        missing = -(-entries // self.page_tokens) - self._pages_of[slot]
        if missing <= 0:
            return True
        free = self.pages - self._used_pages
        if missing > free:
            if missing > free + self._cached_pages:
                return False
            self._evict(missing - free)
        self._take(slot, missing)
        return True

    def shrink(self, slot: int, entries: int) -> None:
        """Free the pages of a slot in use beyond its first `entries` entries."""
        surplus = self._pages_of[slot] - self.pages_for(entries)
        if surplus > 0:
            self._take(slot, -surplus)
            self._truncations.append((slot, entries))

    def hold(self, slot: int, ids: TokenIds, end: int) -> None:
        """Record that a slot in use has the KV entries of `ids[:end]`."""
        self._held.insert(slot, ids, end)

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Record that a slot in use is about to get the first `length` entries of another."""
        self._held.remove(slot)
        self._held.copy(source, slot, length)

    def free(self, slot: int, ids: TokenIds, end: int) -> None:
        """Free a slot; its KV entries are those of `ids[:end]`, which become a cached prefix."""
        assert slot in self._in_use, f"slot {slot} was freed twice"
        self._in_use.remove(slot)
        self._held.insert(slot, ids, end)
        self._cached[slot] = end
        self._cached_pages += self._pages_of[slot]
        self._cut(slot, end)
        if not end:
            self._drop(slot)

    def drop_prefix(self, slot: int) -> None:
        """Forget a free slot's cached prefix: its entries are gone."""
        if slot in self._cached:
            self._drop(slot)

    def pop_truncations(self) -> list[Truncation]:
        """Return the truncations since the last call; the caller frees the memory."""
        truncations, self._truncations = self._truncations, []
        return truncations

    def _take(self, slot: int, pages: int) -> None:
        self._pages_of[slot] += pages
        self._used_pages += pages
        assert self._used_pages <= self.pages, "more pages are taken than there are"

    def _touch(self, found: Match[int]) -> None:
        """Make a cached prefix that is about to be copied the most recently used."""
        slot = next((slot for slot in found.holders if slot in self._cached), None)
        if slot is not None:
            self._cached[slot] = self._cached.pop(slot)

    def _evict(self, pages: int) -> None:
        """Free at least `pages` pages of cached prefixes, the least recently used first, and from their ends."""
        pages = max(pages, self.pages_for(_MIN_EVICTED_TOKENS))
        while pages > 0 and self._cached:
            slot = next(iter(self._cached))
            before = self._pages_of[slot]
            length = (before - pages) * self.page_tokens
            if length >= MIN_SHARED_PREFIX:
                self._cut(slot, min(length, self._cached[slot]))
            else:
                self._drop(slot)
            pages -= before - self._pages_of[slot]

    def _cut(self, slot: int, length: int) -> None:
        """Keep the first `length` entries of a cached prefix, and free its pages beyond."""
        surplus = self._pages_of[slot] - self.pages_for(length)
        if length < self._cached[slot]:
            if length:
                self._held.shrink(slot, length)
            else:
                self._held.remove(slot)
            self._cached[slot] = length
        self._take(slot, -surplus)
        self._cached_pages -= surplus
        self._truncations.append((slot, length))

    def _drop(self, slot: int) -> None:
        """Empty a free slot."""
        self._cached_pages -= self._pages_of[slot]
        self._take(slot, -self._pages_of[slot])
        self._held.remove(slot)
        self._truncations.append((slot, 0))
        del self._cached[slot]
        heappush(self._empty, slot)
