"""The suffix index in Python: the reference of `suffix.c`, which leaves the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.drafters.suffix.memory import (
    ALWAYS,
    CONTEXT,
    DECAY,
    FOLLOWERS,
    MAX_COUNT,
    MAX_OFFERS,
    ORDERS,
    SHARE_EDGES,
    IndexMemory,
    TokenKind,
)
from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.segments import IntArray

_WORD, _HALF = 0xFFFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF
_EMPTY = (0, 0, 0)

Follower = tuple[int, int, int]  # token, writer, count


@dataclass(frozen=True, slots=True)
class _TextIds:
    """One of the texts."""

    group: int
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class _Offer:
    """A token that may follow, its class, and how likely it is."""

    token: int
    kind: int
    probability: float


class PythonSuffixKernels:
    """`SuffixKernels` without a C compiler."""

    lookup_function = 0

    def read(
        self, memory: IndexMemory, rows: IntArray, counts: IntArray, tokens: IntArray, kinds: NDArray[np.uint8]
    ) -> None:
        """Read the next tokens of some texts."""
        first, slots = 0, _Slots(memory)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            text = memory.texts[row]
            recent, ids = _tail(text), _text_ids(text)
            last = first + count
            for token, kind in zip(tokens[first:last].tolist(), kinds[first:last].tolist(), strict=True):
                _read(slots, ids, recent, token, kind)
                recent = [*recent, token][-CONTEXT:]
            text["length"] = len(recent)
            text["tail"][CONTEXT - len(recent) :] = recent
            first = last

    def lookup(
        self, memory: IndexMemory, rows: IntArray, nodes: Nodes, frontier: IntArray, width: int
    ) -> tuple[IntArray, FloatArray]:
        """Return what may follow the nodes of a frontier."""
        slots, shape = _Slots(memory), (len(frontier), width)
        tokens, probabilities = np.zeros(shape, np.int64), np.zeros(shape, np.float64)
        for row, node in enumerate(frontier.tolist()):
            text = memory.texts[rows[nodes.tree[node]]]
            offers = slots.offers([*_tail(text), *_path(nodes, node)], _text_ids(text))
            scale = max(reduce(add, (offer.probability for offer in offers), 0.0), 1.0)  # in order, as C adds
            for rank, offer in enumerate(sorted(offers, key=lambda one: -one.probability)[:width]):
                tokens[row, rank], probabilities[row, rank] = offer.token, offer.probability / scale
        return tokens, probabilities


def _read(slots: _Slots, ids: _TextIds, recent: Sequence[int], token: int, kind: int) -> None:
    """Read the token that follows the `recent` ones of a text."""
    if kind == TokenKind.OUTPUT:
        slots.learn(recent, ids, token)
    if kind == TokenKind.RETRACTED:
        slots.retract(recent, ids.group, token)
    elif kind != TokenKind.CONTEXT_ONLY:
        slots.insert(recent, ids.group, ids.prompt if kind == TokenKind.PROMPT else ids.output, token)


class _Slots:
    """The slots of an index, and what was learned about offers."""

    def __init__(self, memory: IndexMemory) -> None:
        self._memory = memory
        self._slots = memory.slots

    def offers(self, recent: Sequence[int], ids: _TextIds) -> list[_Offer]:
        """Return the followers of the longest context, then the others of shorter ones."""
        offers: list[_Offer] = []
        longer = 0
        for order, code in reversed(list(enumerate(_hashes(recent, ids.group)))):
            slot = self._find(code, ids.group)
            followers = [] if slot is None else _followers(slot)
            if not followers:
                continue
            total = sum(count for _, _, count in followers)
            for token, writer, count in followers:
                if len(offers) == MAX_OFFERS:
                    return offers
                if all(offer.token != token for offer in offers):
                    kind = _class_of(order, longer, count, total, own=writer in (ids.prompt, ids.output))
                    probability = float(self._memory.held[kind]) / float(self._memory.trials[kind])
                    offers.append(_Offer(token, kind, probability))
            longer = longer or (1 if len(followers) == 1 else 2)
        return offers

    def learn(self, recent: Sequence[int], ids: _TextIds, token: int) -> None:
        """Count what the target drew for every follower that would have been offered."""
        held, trials = self._memory.held, self._memory.trials
        for offer in self.offers(recent, ids):
            trials[offer.kind] = float(trials[offer.kind]) * DECAY + 1.0
            held[offer.kind] = float(held[offer.kind]) * DECAY + (offer.token == token)

    def insert(self, recent: Sequence[int], group: int, writer: int, token: int) -> None:
        """Count a follower of every known context, and of the first unknown one."""
        layout = self._memory.layout
        clock = layout.clock = (layout.clock + 1) & _HALF
        if layout.used > layout.pair_mask and layout.pair_mask < layout.max_pair_mask:
            self._split()
        shorter = True  # whether the context before was known
        for tokens, code in zip(ORDERS, _hashes(recent, group), strict=False):
            slot = self._find(code, group)
            if slot is None and not shorter and tokens > ALWAYS:
                return
            shorter = slot is not None
            if slot is None:
                slot = self._claim(code, group)
            slot["stamp"] = clock
            _set_followers(slot, _counted(_followers(slot), writer, token))

    def retract(self, recent: Sequence[int], group: int, token: int) -> None:
        """Take back what `insert` counted once."""
        for code in _hashes(recent, group):
            slot = self._find(code, group)
            if slot is None:
                continue
            less = [(other, by, count - (other == token)) for other, by, count in _followers(slot)]
            _set_followers(slot, [follower for follower in less if follower[2]])
            if not _followers(slot):
                slot["hash"], slot["group"], slot["stamp"] = 0, 0, 0
                self._memory.layout.used -= 1

    def _split(self) -> None:
        """Take as many pairs again, and move the contexts whose hash says so to their new pairs."""
        layout = self._memory.layout
        pairs = layout.pair_mask + 1
        moved = np.flatnonzero(self._slots["hash"][: 2 * pairs] >> np.uint64(8) & np.uint64(pairs))
        self._slots[moved + 2 * pairs] = self._slots[moved]
        self._slots[moved] = np.zeros(1, self._slots.dtype)
        layout.pair_mask = 2 * pairs - 1

    def _pair(self, code: int) -> Any:
        first = 2 * ((code >> 8) & self._memory.layout.pair_mask)
        return self._slots[first : first + 2]

    def _find(self, code: int, group: int) -> Any:
        """Return the slot of a context, or None."""
        for slot in self._pair(code):
            if int(slot["hash"]) == code and int(slot["group"]) == group:
                return slot
        return None

    def _claim(self, code: int, group: int) -> Any:
        """Return a new slot for a context, in the place of the one that was not written for longer."""
        pair, clock = self._pair(code), self._memory.layout.clock
        ages = [(clock - int(slot["stamp"])) & _HALF if slot["hash"] else _HALF + 1 for slot in pair]
        slot = pair[1] if ages[1] > ages[0] else pair[0]
        self._memory.layout.used += not slot["hash"]
        slot["hash"], slot["group"] = code, group
        _set_followers(slot, [])
        return slot


def _hashes(recent: Sequence[int], group: int) -> Iterator[int]:
    """Hash the last tokens for every order; there are fewer orders at the start of a text."""
    code = group
    for length, token in enumerate(reversed(recent), 1):
        code = (code + (token & _HALF) + 1) & _WORD
        code ^= code >> 32
        code = code * 0x9E37_79B9_7F4A_7C15 & _WORD
        code ^= code >> 29
        if length in ORDERS:
            yield code | 1


def _class_of(order: int, longer: int, count: int, total: int, *, own: bool) -> int:
    """Return the class of a follower.

    It has the order, what a longer context says, the share of the context, and whether it is of the same text.
    """
    kind = min(count, 3) - 1
    if count < total:
        kind = 3 + sum(count / total >= edge for edge in SHARE_EDGES)
    return ((order * 3 + longer) * (4 + len(SHARE_EDGES)) + kind) * 2 + own


def _counted(followers: list[Follower], writer: int, token: int) -> list[Follower]:
    """Return followers, the newest first, after a context was followed by `token` once more."""
    known = next((place for place, follower in enumerate(followers) if follower[0] == token), None)
    count = 1 if known is None else followers[known][2] + 1
    if known is None and len(followers) == FOLLOWERS:  # the rarest gives way, of equals the oldest, never the newest
        known = min(range(1, FOLLOWERS), key=lambda place: (followers[place][2], -place))
    others = [follower for place, follower in enumerate(followers) if place != known]
    followers = [(token, writer, count), *others]
    if count > MAX_COUNT:
        followers = [(other, by, (times + 1) // 2) for other, by, times in followers]
    return followers


def _followers(slot: Any) -> list[Follower]:
    return [follower for follower in slot["followers"].tolist() if follower[2]]


def _set_followers(slot: Any, followers: list[Follower]) -> None:
    slot["followers"] = followers + [_EMPTY] * (FOLLOWERS - len(followers))


def _text_ids(text: Any) -> _TextIds:
    return _TextIds(int(text["group"]), int(text["prompt"]), int(text["output"]))


def _tail(text: Any) -> list[int]:
    """Return the last tokens of a text."""
    tail: list[int] = text["tail"][CONTEXT - int(text["length"]) :].tolist()
    return tail


def _path(nodes: Nodes, node: int) -> list[int]:
    """Return the last tokens of the path from the root, which is not among them, to a node."""
    tokens: list[int] = []
    while nodes.parent[node] >= 0 and len(tokens) < CONTEXT:
        tokens.append(int(nodes.token[node]))
        node = int(nodes.parent[node])
    return tokens[::-1]
