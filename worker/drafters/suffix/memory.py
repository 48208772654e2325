"""The memory of a suffix index: slots of contexts, the texts that are decoded, and how often offers held.

One slot of 64 bytes is a context of one group with the last four tokens that followed it. A new token takes one or two:
contexts of up to three tokens always have one, a longer one once the next shorter one was known before (as in PPM,
Cleary and Witten 1984). Slots are in pairs, by hash; of a full pair the one that was not written for longer gives way.
So texts are forgotten by age, and the memory stays in its bound.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any, Final

import numpy as np

from worker.engine.cpu.kernels import address, members
from worker.engine.host.nodes import FloatArray

# Bytes of all slots. Every MiB remembers about 10,000 tokens of new text. More remembers longer; it is slower where the
# processor's cache is smaller.
INDEX_BYTES: Final = 32 << 20

ORDERS: Final = (1, 2, 3, 5, 8, 13)  # tokens of contexts. More cost a slot and a cache line each.
ALWAYS: Final = 3  # contexts of up to this many tokens always get a slot. More learn sooner, and take more slots.
CONTEXT: Final = max(ORDERS)  # tokens of a text that are kept
FOLLOWERS: Final = 4  # of a context: a slot is one cache line
MAX_OFFERS: Final = 12  # candidates of a node before the best are chosen
MAX_COUNT: Final = 255  # of a follower; then all counts of its context are halved. Lower follows new texts sooner.
SHARE_EDGES: Final = (0.15, 0.3, 0.5, 0.7)  # of followers in their contexts. More classes learn more slowly.
DECAY: Final = 0.998  # of what was learned, per trial. Lower follows new texts sooner, and is noisier.

# The first estimates of a class: by order, times by what a longer context says, times by count or share. They are what
# was learned on MT-Bench and GSM8K answers, and count for `_PRIOR_TRIALS`; more learn more slowly.
_PRIOR_TRIALS = 4.0
_PRIOR_BY_ORDER = np.array([0.2, 0.5, 0.6, 0.75, 0.85, 0.92])
_PRIOR_BY_LONGER = np.array([1.0, 0.15, 0.5])  # no longer context is known; one with a single follower; with several
_PRIOR_BY_SHARE = np.array([1.0, 1.0, 1.0, 0.1, 0.22, 0.4, 0.6, 0.8])  # the only one, seen once, twice, more; by share

_FOLLOWER = np.dtype([("token", np.int32), ("writer", np.uint32), ("count", np.uint32)])
_COUNTERS = [(name, np.uint32) for name in ("group", "prompt", "output", "length")]
SLOT: Final = np.dtype(
    [("hash", np.uint64), ("group", np.uint32), ("stamp", np.uint32), ("followers", _FOLLOWER, FOLLOWERS)]
)
TEXT: Final = np.dtype([*_COUNTERS, ("tail", np.int32, CONTEXT)])
_FIRST_SLOTS = 1 << 12  # slots from the start; twice as many when half are used. More touch memory that is not needed.
_FIRST_TEXTS = 8  # rows for texts from the start


class TokenKind(IntEnum):
    """What a token that is read is to the index."""

    CONTEXT_ONLY = 0  # it is known: nothing is counted
    PROMPT = 1
    OUTPUT = 2  # the target drew it: what would have been offered there is judged by it
    FORCED = 3  # by a grammar: it says nothing about what would have been offered
    RETRACTED = 4  # it is taken back


class IndexLayout(ctypes.Structure):
    """`index_t` of suffix.c."""

    _fields_ = (
        *members("slots texts held trials orders edges", ctypes.c_void_p),
        *members("pair_mask max_pair_mask", ctypes.c_uint64),
        *members("used order_count always", ctypes.c_int64),
        ("decay", ctypes.c_double),
        ("clock", ctypes.c_uint32),
    )


class IndexMemory:
    """The arrays of an index, which compiled functions read by their addresses."""

    def __init__(self, max_bytes: int) -> None:
        """Take at most `max_bytes` for slots: the largest power of two within it, but two slots at least."""
        count = 1 << (max(max_bytes // SLOT.itemsize, 2).bit_length() - 1)
        self.slots = np.zeros(count, SLOT)
        self.held, self.trials = _prior()  # of offers, by class
        self.orders, self.edges = np.array(ORDERS, np.int64), np.array(SHARE_EDGES)
        self.layout = IndexLayout(
            slots=address(self.slots),
            held=address(self.held),
            trials=address(self.trials),
            orders=address(self.orders),
            edges=address(self.edges),
            pair_mask=min(count, _FIRST_SLOTS) // 2 - 1,
            max_pair_mask=count // 2 - 1,
            order_count=len(ORDERS),
            always=ALWAYS,
            decay=DECAY,
        )
        self.take_texts(np.zeros(_FIRST_TEXTS, TEXT))

    def take_texts(self, texts: np.ndarray[Any, Any]) -> None:
        """Use other rows for texts."""
        self.texts, self.layout.texts = texts, address(texts)


def _prior() -> tuple[FloatArray, FloatArray]:
    """Return how often offers held and their trials [classes], as they are believed at the start."""
    likely = _PRIOR_BY_ORDER[:, None, None] * _PRIOR_BY_LONGER[:, None] * _PRIOR_BY_SHARE
    held = np.repeat(_PRIOR_TRIALS * likely.ravel(), 2)  # of another text; of the same
    return held, np.full(len(held), _PRIOR_TRIALS)
