"""Laws of the processes of the other ranks: they end with the first rank, and leave no files."""

from __future__ import annotations

import pytest

from worker.loading import rank_processes
from worker.loading.rank_processes import RankProcesses
from worker.settings import WorkerSettings


def test_the_processes_of_the_other_ranks_are_started_at_once_and_end_when_they_are_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[tuple[str, ...]] = []

    def module(*arguments: str) -> tuple[str, ...]:
        started.append(arguments)
        return ("sleep", "600")

    monkeypatch.setattr(rank_processes, "python_module", module)
    processes = RankProcesses(WorkerSettings(tp=3))
    assert started == [("worker.node.rank_main", str(processes.store), rank) for rank in ("1", "2")]
    assert [process.poll() for process in processes.running] == [None, None]
    processes.stop()
    assert all(process.wait(60) for process in processes.running)
    assert not processes.store.parent.exists()
    processes.stop()  # again, at exit
