"""Slots: which KV slots are free, how much KV memory is spoken for, and which texts free slots still hold.

Counts alone: the keys and values lie in `kv_cache` and `native_kv`.
"""

from __future__ import annotations

from worker.engine.errors import OutOfSlots


class Slots:
    """Slots 0..count-1 that share room for `tokens` tokens.

    Whoever takes a slot reserves the most it will ever write, so that nobody runs out of memory later. A free slot goes
    on holding the text of its last owner, for others that begin alike, as long as that memory is not needed.
    """

    def __init__(self, count: int, tokens: int) -> None:
        """Start with every slot free and blank."""
        self.count = count
        self.tokens = tokens
        self._reserved: dict[int, int] = {}  # of each slot in use
        self._texts: dict[int, list[int]] = {}  # what a slot holds without an owner's say; longest freed first
        self._emptied: list[int] = []  # slots whose texts had to make way

    @property
    def free(self) -> int:
        """Slots that nobody holds."""
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
        remembered = sum(max(0, len(text) - self._reserved.get(slot, 0)) for slot, text in self._texts.items())
        return self.used_tokens + remembered

    @property
    def texts(self) -> dict[int, list[int]]:
        """Slots whose entries still are those of a text that has ended."""
        return self._texts

    def fits(self, tokens: int) -> bool:
        """True if a slot with room for so many tokens can be taken."""
        return self.free > 0 and tokens <= self.free_tokens

    def take(self, tokens: int) -> int:
        """Hand out a slot with room for so many tokens; raises OutOfSlots.

        Blank slots go first, the lowest of them, then the text that ended longest ago: what ended lately is likeliest
        to be asked for again. That slots in use lie together matters to the padded attention alone, and to it mostly
        when all of them are in use.
        """
        if not self.fits(tokens):
            raise OutOfSlots
        free = [slot for slot in range(self.count) if slot not in self._reserved]
        ended = [slot for slot in self._texts if slot not in self._reserved]
        blank = next((slot for slot in free if slot not in self._texts), None)
        remembered = sum(len(self._texts[slot]) for slot in ended)
        # A blank slot would need memory beside all that is remembered; else the oldest text gives up its own.
        slot = ended[0] if blank is None or (ended and remembered + tokens > self.free_tokens) else blank
        self._reserved[slot] = tokens
        while self.held_tokens > self.tokens:
            oldest = next(iter(self._texts))
            self.forget(oldest)
            self._emptied.append(oldest)
        return slot

    def give_back(self, slot: int, text: list[int]) -> None:
        """Take a slot back, which now holds `text`."""
        assert slot in self._reserved, f"slot {slot} was given back twice"
        del self._reserved[slot]
        if text:
            self._texts[slot] = text

    def forget(self, slot: int) -> None:
        """Note that the text of an earlier owner is gone or about to be overwritten."""
        self._texts.pop(slot, None)

    def emptied(self) -> tuple[int, ...]:
        """Return the slots whose texts made way since the last call: their memory is to be given back."""
        slots = tuple(self._emptied)
        self._emptied.clear()
        return slots
