"""Allocation of KV slots: which are free, how much KV memory is reserved, and which prefixes slots hold.

It only counts; the keys and values are in the `KvStore`.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from worker.engine.errors import OutOfSlots
from worker.engine.kv.prefix_tree import Match, PrefixTree


class SlotAllocator:
    """Slots 0..count-1 that share memory for `tokens` tokens.

    Each sequence reserves its maximum length in tokens, so that none runs out of memory while decoding. A free slot
    keeps the entries of its last sequence as a cached prefix until the memory is needed, for sequences that start with
    the same tokens.
    """

    def __init__(self, count: int, tokens: int) -> None:
        self.count = count
        self.tokens = tokens
        self._held: PrefixTree[int] = PrefixTree()  # token ids with KV entries, by slot
        self._reserved: dict[int, int] = {}  # tokens, by slot in use
        self._empty = list(range(count))  # free slots without a cached prefix, as a heap
        self._cached: dict[int, int] = {}  # length of a cached prefix, by free slot; the longest free comes first
        self._left: dict[int, int] = {}  # the same of slots whose new sequence has written nothing yet
        self._used_tokens = self._cached_tokens = 0
        self._evicted: list[int] = []
        heapify(self._empty)

    @property
    def free_slots(self) -> int:
        """Number of slots without a sequence."""
        return self.count - len(self._reserved)

    @property
    def used_tokens(self) -> int:
        """Tokens reserved by running sequences."""
        return self._used_tokens

    @property
    def free_tokens(self) -> int:
        """Tokens that can still be reserved; cached prefixes count as free because they can be evicted."""
        return self.tokens - self._used_tokens

    @property
    def held_tokens(self) -> int:
        """Tokens reserved or cached."""
        return self._used_tokens + self._cached_tokens

    def longest_prefix(self, ids: list[int]) -> Match[int]:
        """Return the longest prefix of `ids` that slots hold."""
        return self._held.longest(ids)

    def cached_length(self, slot: int) -> int:
        """Return the length of a free slot's cached prefix."""
        return self._cached.get(slot, 0)

    def can_allocate(self, tokens: int) -> bool:
        """Return whether a slot with this many tokens can be allocated."""
        return self.free_slots > 0 and tokens <= self.free_tokens

    def allocate(self, tokens: int) -> int:
        """Reserve a slot with this many tokens; raises OutOfSlots.

        Take the lowest empty slot first, then the least recently freed cached prefix: recent prefixes are the most
        likely to be asked for again.
        """
        if not self.can_allocate(tokens):
            raise OutOfSlots
        # If memory is short, an empty slot would evict the oldest prefix anyway: take that prefix's slot.
        short = not self._empty or self._cached_tokens + tokens > self.free_tokens
        slot = next(iter(self._cached)) if self._cached and short else heappop(self._empty)
        self._reserved[slot] = tokens
        self._used_tokens += tokens
        if slot in self._cached:
            self._left[slot] = self._cached.pop(slot)
            self._cached_tokens -= min(tokens, self._left[slot])
        while self.held_tokens > self.tokens:
            oldest = next(iter(self._cached or self._left))
            self.drop_prefix(oldest)
            self._evicted.append(oldest)
        return slot

    def hold(self, slot: int, ids: list[int], end: int) -> None:
        """Record that a slot in use has the KV entries of `ids[:end]`."""
        self._held.insert(slot, ids, end)

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Record that a slot in use is about to get the first `length` entries of `source`, which may be itself."""
        if source == slot:
            self._held.shrink(slot, length)
            self._cached_tokens -= max(0, self._left.pop(slot) - self._reserved[slot])
        else:
            self.drop_left(slot)
            self._held.copy(source, slot, length)

    def free(self, slot: int, ids: list[int], end: int) -> None:
        """Free a slot; its KV entries are those of `ids[:end]`."""
        assert slot in self._reserved, f"slot {slot} was freed twice"
        if end:
            self.drop_left(slot)
            self._held.insert(slot, ids, end)
        self._cached_tokens -= max(0, self._left.get(slot, 0) - self._reserved[slot])
        self._used_tokens -= self._reserved.pop(slot)
        length = end or self._left.pop(slot, 0)
        if length:
            self._cached[slot] = length
            self._cached_tokens += length
        else:
            heappush(self._empty, slot)

    def drop_left(self, slot: int) -> None:
        """Forget the prefix that was cached in a slot in use: its sequence is about to overwrite it."""
        left = self._left.pop(slot, None)
        if left is not None:
            self._cached_tokens -= max(0, left - self._reserved[slot])
            self._held.remove(slot)

    def drop_prefix(self, slot: int) -> None:
        """Forget a slot's cached prefix: its entries are gone or about to be overwritten."""
        self.drop_left(slot)
        if slot in self._cached:
            self._cached_tokens -= self._cached.pop(slot)
            self._held.remove(slot)
            heappush(self._empty, slot)

    def pop_evicted(self) -> tuple[int, ...]:
        """Return the slots whose prefixes were evicted since the last call; the caller frees their memory."""
        slots = tuple(self._evicted)
        self._evicted.clear()
        return slots
