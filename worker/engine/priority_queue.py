"""A priority queue whose items can be removed and get other priorities."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heappop, heappush
from itertools import count, islice
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class PriorityQueue(Generic[Item]):
    """Distinct items; the lowest priority comes first, and of equals the one pushed first."""

    def __init__(self) -> None:
        """Start empty."""
        self._heap: list[tuple[int, int, Item]] = []  # (priority, ticket, item); entries with old tickets are stale
        self._tickets: dict[Item, int] = {}
        self._next_ticket = count()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._tickets)

    def __iter__(self) -> Iterator[Item]:
        """Iterate over the items in arbitrary order."""
        return iter(self._tickets)

    def __contains__(self, item: Item) -> bool:
        """Return whether an item is queued."""
        return item in self._tickets

    def push(self, item: Item, priority: int) -> None:
        """Add an item, or change its priority."""
        ticket = self._tickets[item] = next(self._next_ticket)
        heappush(self._heap, (priority, ticket, item))

    def discard(self, item: Item) -> None:
        """Remove an item if it is there."""
        self._tickets.pop(item, None)

    def pop(self, limit: int) -> list[Item]:
        """Remove and return up to `limit` items, the first ones."""
        return list(islice(self.drain(), limit))

    def drain(self) -> Iterator[Item]:
        """Remove and yield the items, the first ones first; those that are not asked for stay."""
        heap, tickets = self._heap, self._tickets
        while heap:
            _, ticket, item = heappop(heap)
            if tickets.get(item) == ticket:
                del tickets[item]
                yield item

    def first(self) -> Item | None:
        """Return the first item, None if there is none."""
        while self._heap and self._tickets.get(self._heap[0][2]) != self._heap[0][1]:
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None
