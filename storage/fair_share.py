"""Fair share: divide a worker's free slots between priority classes, API keys, and a key's jobs.

A slot goes to the highest class that waits, or to one that has aged (Ageing). Within a class it goes to the owner with
the fewest running requests, then to that owner's job with the fewest. So neither a large job nor many jobs of one owner
delay the others.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

AGEING_REQUESTS: Final = 16


class Ageing:
    """Which class gets the next slot, so that none starves: the memory of one worker.

    A waiting class ages by each slot that goes to another one. After `requests` of them, the next slot is its own. So
    it gets at least one of `requests` + 2 slots, however many requests of higher classes wait.
    """

    def __init__(self, requests: int = AGEING_REQUESTS) -> None:
        self._requests = requests
        self._passed_over: dict[int, int] = {}  # slots since its last one, by rank of a waiting class

    def choose(self, ranks: Collection[int]) -> int:
        """Return the rank of the class that gets the next slot, of those that wait."""
        passed = {rank: self._passed_over.get(rank, 0) for rank in ranks}
        oldest = max(ranks, key=lambda rank: (passed[rank], rank))
        chosen = oldest if passed[oldest] >= self._requests else max(ranks)
        self._passed_over = {rank: 0 if rank == chosen else count + 1 for rank, count in passed.items()}
        return chosen


@dataclass(frozen=True, slots=True)
class JobShare:
    """A job with queued requests, and what it and its owner have running."""

    job_id: str
    owner: str  # API key id; '': all jobs without a key
    running: int  # requests of the job that are being decoded
    owner_running: int  # the same over all jobs of the owner
    rank: int = 0  # of its class; higher comes first


class FairShare:
    """Allocates slots to waiting jobs. Ties go round robin, in the order in which the jobs were given."""

    def __init__(self, jobs: Iterable[JobShare], ageing: Ageing | None = None) -> None:
        self._ageing = ageing or Ageing()
        self._jobs: dict[str, JobShare] = {}
        self._running: Counter[str] = Counter()
        self._owners_running: Counter[str] = Counter()
        self._room: dict[str, int] = {}  # of jobs with a limit: requests that they may run besides those that they run
        for job in jobs:
            self._jobs[job.job_id] = job
            self._running[job.job_id] = job.running
            self._owners_running[job.owner] = job.owner_running

    @property
    def job_ids(self) -> list[str]:
        """Ids of the jobs that still have requests to claim."""
        return list(self._jobs)

    def allocate(self, slots: int) -> dict[str, int]:
        """Return how many of the slots each job gets; fewer in total if all jobs reach their limits."""
        classes = {rank: self._in_class(rank) for rank in {job.rank for job in self._jobs.values()}}
        slots_by_job: Counter[str] = Counter()
        for _ in range(slots):
            if not classes:
                break
            rank = self._ageing.choose(classes)
            slots_by_job[classes[rank].next_job()] += 1
            if classes[rank].empty:
                del classes[rank]
        return dict(slots_by_job)

    def add_running(self, job_id: str, requests: int) -> None:
        """Count requests of a job that were just claimed, so that the next allocation knows them."""
        self._running[job_id] += requests
        self._owners_running[self._jobs[job_id].owner] += requests
        if job_id in self._room:
            self.set_room(job_id, self._room[job_id] - requests)

    def set_room(self, job_id: str, room: int) -> None:
        """Limit how many more requests a job may run; without room it gets no more slots."""
        self._room[job_id] = room
        if room <= 0:
            self.remove(job_id)

    def remove(self, job_id: str) -> None:
        """Allocate no more slots to a job: it has nothing left to claim."""
        self._jobs.pop(job_id, None)

    def _in_class(self, rank: int) -> _ClassQueue:
        jobs = [job for job in self._jobs.values() if job.rank == rank]
        return _ClassQueue(jobs, self._running, self._owners_running, self._room)


class _ClassQueue:
    """The waiting jobs of one class during an allocation."""

    def __init__(
        self,
        jobs: Iterable[JobShare],
        running: Mapping[str, int],
        owners_running: Mapping[str, int],
        room: Mapping[str, int],
    ) -> None:
        self._room = dict(room)
        self._jobs: dict[str, list[tuple[int, int, str]]] = {}  # (running, order, job id) by owner
        for order, job in enumerate(jobs):
            self._jobs.setdefault(job.owner, []).append((running[job.job_id], order, job.job_id))
        self._owners = [(owners_running[owner], order, owner) for order, owner in enumerate(self._jobs)]
        for heap in (self._owners, *self._jobs.values()):
            heapq.heapify(heap)

    @property
    def empty(self) -> bool:
        """True when each job has as many slots as it has room for."""
        return not self._owners

    def next_job(self) -> str:
        """Give a slot to the job that comes next, and return its id."""
        owner_running, owner_order, owner = heapq.heappop(self._owners)
        jobs = self._jobs[owner]
        running, order, job_id = heapq.heappop(jobs)
        if job_id in self._room:
            self._room[job_id] -= 1
        if self._room.get(job_id, 1) > 0:
            heapq.heappush(jobs, (running + 1, order, job_id))
        if jobs:
            heapq.heappush(self._owners, (owner_running + 1, owner_order, owner))
        return job_id
