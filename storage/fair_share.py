"""FairShare: which job gets the next free place of a worker.

Places go first to whoever has the fewest requests running, whatever the number of their jobs, and then to that owner's
job with the fewest. So nobody waits behind a large job of somebody else, nor behind many.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobShare:
    """A job that has something to claim."""

    job_id: str
    owner: str  # id of its key; '': all who have none
    running: int  # requests of the job that are being decoded
    owner_running: int  # of all jobs of the owner


class FairShare:
    """Jobs that wait for places; those in equal position take turns in the order in which they were given."""

    def __init__(self, jobs: Iterable[JobShare]) -> None:
        """Let these jobs wait."""
        self._owners: dict[str, str] = {}
        self._running: Counter[str] = Counter()
        self._owners_running: Counter[str] = Counter()
        for job in jobs:
            self._owners[job.job_id] = job.owner
            self._running[job.job_id] = job.running
            self._owners_running[job.owner] = job.owner_running

    @property
    def job_ids(self) -> list[str]:
        """The jobs that still wait."""
        return list(self._owners)

    def allocate(self, places: int) -> dict[str, int]:
        """Return how many of so many places each job should have."""
        waiting: dict[str, list[tuple[int, int, str]]] = {}
        for order, (job_id, owner) in enumerate(self._owners.items()):
            waiting.setdefault(owner, []).append((self._running[job_id], order, job_id))
        turns = [(self._owners_running[owner], order, owner) for order, owner in enumerate(waiting)]
        for heap in (turns, *waiting.values()):
            heapq.heapify(heap)
        shares: Counter[str] = Counter()
        for _ in range(places if turns else 0):
            count, order, owner = turns[0]
            heapq.heapreplace(turns, (count + 1, order, owner))
            running, place, job_id = waiting[owner][0]
            heapq.heapreplace(waiting[owner], (running + 1, place, job_id))
            shares[job_id] += 1
        return dict(shares)

    def took(self, job_id: str, places: int) -> None:
        """Note that a job has taken places."""
        self._running[job_id] += places
        self._owners_running[self._owners[job_id]] += places

    def leave(self, job_id: str) -> None:
        """Note that a job wants no more."""
        del self._owners[job_id]
