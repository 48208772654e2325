"""Fair share: divide a worker's free slots between API keys, and within a key between its jobs.

Each slot goes to the owner with the fewest running requests, then to that owner's job with the fewest. So neither a
large job nor many jobs of one owner delay the others.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class JobShare:
    """A job with queued requests, and what it and its owner have running."""

    job_id: str
    owner: str  # API key id; '': all jobs without a key
    running: int  # requests of the job that are being decoded
    owner_running: int  # the same over all jobs of the owner


class FairShare:
    """Allocates slots to waiting jobs. Ties go round robin, in the order in which the jobs were given."""

    def __init__(self, jobs: Iterable[JobShare]) -> None:
        self._owners: dict[str, str] = {}
        self._running: Counter[str] = Counter()
        self._owners_running: Counter[str] = Counter()
        for job in jobs:
            self._owners[job.job_id] = job.owner
            self._running[job.job_id] = job.running
            self._owners_running[job.owner] = job.owner_running

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs that still have requests to claim."""
        return list(self._owners)

    def allocate(self, slots: int) -> dict[str, int]:
        """Return how many of the slots each job gets."""
        waiting: dict[str, list[tuple[int, int, str]]] = {}
        for order, (job_id, owner) in enumerate(self._owners.items()):
            waiting.setdefault(owner, []).append((self._running[job_id], order, job_id))
        owners = [(self._owners_running[owner], order, owner) for order, owner in enumerate(waiting)]
        for heap in (owners, *waiting.values()):
            heapq.heapify(heap)
        slots_by_job: Counter[str] = Counter()
        for _ in range(slots if owners else 0):
            owner_running, order, owner = owners[0]
            heapq.heapreplace(owners, (owner_running + 1, order, owner))
            running, order, job_id = waiting[owner][0]
            heapq.heapreplace(waiting[owner], (running + 1, order, job_id))
            slots_by_job[job_id] += 1
        return dict(slots_by_job)

    def add_running(self, job_id: str, requests: int) -> None:
        """Count requests of a job that were just claimed, so that the next allocation knows them."""
        self._running[job_id] += requests
        self._owners_running[self._owners[job_id]] += requests

    def remove(self, job_id: str) -> None:
        """Allocate no more slots to a job: it has nothing left to claim."""
        del self._owners[job_id]
