"""Allocation of KV slots: which are free, how much KV memory is reserved, and which prefixes free slots still cache.

It only counts; the keys and values are in the `KvStore`.
"""

from __future__ import annotations

from worker.engine.errors import OutOfSlots


class SlotAllocator:
    """Slots 0..count-1 that share memory for `tokens` tokens.

    Each sequence reserves its maximum length in tokens, so that none runs out of memory while decoding. A free slot
    keeps the entries of its last sequence as a cached prefix until the memory is needed, for sequences that start with
    the same tokens.
    """

    def __init__(self, count: int, tokens: int) -> None:
        self.count = count
        self.tokens = tokens
        self._reserved: dict[int, int] = {}  # tokens, by slot in use
        self._cached_prefixes: dict[int, list[int]] = {}  # token ids, by slot; the longest free comes first
        self._evicted: list[int] = []

    @property
    def free_slots(self) -> int:
        """Number of slots without a sequence."""
        return self.count - len(self._reserved)

    @property
    def used_tokens(self) -> int:
        """Tokens reserved by running sequences."""
        return sum(self._reserved.values())

    @property
    def free_tokens(self) -> int:
        """Tokens that can still be reserved; cached prefixes count as free because they can be evicted."""
        return self.tokens - self.used_tokens

    @property
    def held_tokens(self) -> int:
        """Tokens reserved or cached."""
        cached = (max(0, len(ids) - self._reserved.get(slot, 0)) for slot, ids in self._cached_prefixes.items())
        return self.used_tokens + sum(cached)

    @property
    def cached_prefixes(self) -> dict[int, list[int]]:
        """Token ids of finished sequences whose KV entries are still in their slots, by slot."""
        return self._cached_prefixes

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
        free = [slot for slot in range(self.count) if slot not in self._reserved]
        cached = [slot for slot in self._cached_prefixes if slot not in self._reserved]
        empty = next((slot for slot in free if slot not in self._cached_prefixes), None)
        cached_tokens = sum(len(self._cached_prefixes[slot]) for slot in cached)
        # If memory is short, an empty slot would evict the oldest prefix anyway: take that prefix's slot.
        slot = cached[0] if empty is None or (cached and cached_tokens + tokens > self.free_tokens) else empty
        self._reserved[slot] = tokens
        while self.held_tokens > self.tokens:
            oldest = next(iter(self._cached_prefixes))
            self.drop_prefix(oldest)
            self._evicted.append(oldest)
        return slot

    def free(self, slot: int, ids: list[int]) -> None:
        """Free a slot; its KV entries are those of `ids`."""
        assert slot in self._reserved, f"slot {slot} was freed twice"
        del self._reserved[slot]
        if ids:
            self._cached_prefixes[slot] = ids

    def drop_prefix(self, slot: int) -> None:
        """Forget a slot's cached prefix: its entries are gone or about to be overwritten."""
        self._cached_prefixes.pop(slot, None)

    def pop_evicted(self) -> tuple[int, ...]:
        """Return the slots whose prefixes were evicted since the last call; the caller frees their memory."""
        slots = tuple(self._evicted)
        self._evicted.clear()
        return slots
