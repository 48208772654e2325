"""A priority queue whose items can be removed and get other priorities."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterator
from itertools import count, islice
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)
_Entry = tuple[int, int, Item]  # priority, ticket, item; no two have the same ticket


class PriorityQueue(Generic[Item]):
    """Distinct items; the lowest priority comes first, and of equals the one pushed first.

    A sorted list: moving thousands of its entries takes less than comparing a few in Python. An entry that is not its
    item's latest one is stale, and is removed later, with others.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._sorted: list[_Entry[Item]] = []
        self._latest: dict[Item, _Entry[Item]] = {}
        self._tickets = count()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._latest)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the items in order. Push none meanwhile."""
        self._remove_stale()
        latest = self._latest
        return (entry[2] for entry in self._sorted if latest.get(entry[2]) is entry)

    def __contains__(self, item: Item) -> bool:
        """Return whether an item is queued."""
        return item in self._latest

    def push(self, item: Item, priority: int) -> None:
        """Add an item, or change its priority."""
        entry = self._latest[item] = priority, next(self._tickets), item
        insort(self._sorted, entry)

    def discard(self, item: Item) -> None:
        """Remove an item if it is there."""
        self._latest.pop(item, None)

    def pop(self, limit: int) -> list[Item]:
        """Remove and return up to `limit` items, the first ones."""
        items = list(islice(self, limit))
        for item in items:
            del self._latest[item]
        return items

    def _remove_stale(self) -> None:
        """Remove the stale entries before the first item, and all if they are many."""
        entries, latest = self._sorted, self._latest
        if len(entries) > 2 * len(latest):
            entries[:] = [entry for entry in entries if latest.get(entry[2]) is entry]
            return
        stale = 0
        for entry in entries:
            if latest.get(entry[2]) is entry:
                break
            stale += 1
        del entries[:stale]
