"""SlotAllocator: which KV slots are free, how much KV memory is spoken for, and which texts free slots still hold.

Counts alone: the keys and values lie in `kv_cache` and `native_kv`.
"""

from __future__ import annotations

from worker.engine.errors import OutOfSlots


class SlotAllocator:
    """SlotAllocator 0..count-1 that share room for `tokens` tokens.

    Whoever takes a slot reserves the most it will ever write, so that nobody runs out of memory later. A free slot goes
    on holding the text of its last owner, for others that begin alike, as long as that memory is not needed.
    """

    def __init__(self, count: int, tokens: int) -> None:
        """Start with every slot free and blank."""
        self.count = count
        self.tokens = tokens
        self._reserved: dict[int, int] = {}  # of each slot in use
        self._cached_prefixes: dict[int, list[int]] = {}  # by slot, the longest free first
        self._evicted: list[int] = []  # slots whose texts had to make way

    @property
    def free_slots(self) -> int:
        """SlotAllocator that nobody holds."""
        return self.count - len(self._reserved)

    @property
    def used_tokens(self) -> int:
        """Tokens reserved by those who hold slots."""
        return sum(self._reserved.values())

    @property
    def free_tokens(self) -> int:
        """Tokens that can still be reserved; remembered texts make way."""
        return self.tokens - self.used_tokens

    @property
    def held_tokens(self) -> int:
        """Tokens that slots hold or may come to hold, remembered texts included."""
        remembered = sum(
            max(0, len(text) - self._reserved.get(slot, 0)) for slot, text in self._cached_prefixes.items()
        )
        return self.used_tokens + remembered

    @property
    def cached_prefixes(self) -> dict[int, list[int]]:
        """SlotAllocator whose entries still are those of a text that has ended."""
        return self._cached_prefixes

    def can_allocate(self, tokens: int) -> bool:
        """True if a slot with room for so many tokens can be taken."""
        return self.free_slots > 0 and tokens <= self.free_tokens

    def allocate(self, tokens: int) -> int:
        """Hand out a slot with room for so many tokens; raises OutOfSlots.

        Blank slots go first, the lowest of them, then the text that ended longest ago: what ended lately is likeliest
        to be asked for again. That slots in use lie together matters to the padded attention alone, and to it mostly
        when all of them are in use.
        """
        if not self.can_allocate(tokens):
            raise OutOfSlots
        free = [slot for slot in range(self.count) if slot not in self._reserved]
        ended = [slot for slot in self._cached_prefixes if slot not in self._reserved]
        blank = next((slot for slot in free if slot not in self._cached_prefixes), None)
        remembered = sum(len(self._cached_prefixes[slot]) for slot in ended)
        # A blank slot would need memory beside all that is remembered; else the oldest text gives up its own.
        slot = ended[0] if blank is None or (ended and remembered + tokens > self.free_tokens) else blank
        self._reserved[slot] = tokens
        while self.held_tokens > self.tokens:
            oldest = next(iter(self._cached_prefixes))
            self.drop_prefix(oldest)
            self._evicted.append(oldest)
        return slot

    def free(self, slot: int, text: list[int]) -> None:
        """Take a slot back, which now holds `text`."""
        assert slot in self._reserved, f"slot {slot} was given back twice"
        del self._reserved[slot]
        if text:
            self._cached_prefixes[slot] = text

    def drop_prefix(self, slot: int) -> None:
        """Note that the text of an earlier owner is gone or about to be overwritten."""
        self._cached_prefixes.pop(slot, None)

    def pop_evicted(self) -> tuple[int, ...]:
        """Return the slots whose texts made way since the last call: their memory is to be given back."""
        slots = tuple(self._evicted)
        self._evicted.clear()
        return slots
