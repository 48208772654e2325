"""The processes of a replica's ranks above 0. They need neither torch nor a model to start.

A worker starts them before it imports torch itself: imports take seconds, and all ranks have them at once.
"""

from __future__ import annotations

import atexit
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.processes import Command, launch, python_module
from jobs.settings import environment
from worker.settings import WorkerSettings


class RankProcesses:
    """The running processes, and the store in which they wait for the first rank."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Start a process for each rank but the first. Call it from the main thread (see `launch`)."""
        self._folder = TemporaryDirectory(prefix="basic-ranks-")  # kept until stop(): new process groups use the store
        self.store = Path(self._folder.name) / "store"
        self.running = [_start(settings, rank, self.store) for rank in range(1, settings.tp)]
        atexit.register(self.stop)

    def stop(self, wait_s: float = 0.0) -> None:
        """Kill the processes that have not ended by themselves after `wait_s` seconds each."""
        for process in self.running:
            try:
                process.wait(wait_s)
            except subprocess.TimeoutExpired:
                process.kill()
        self._folder.cleanup()


def _start(settings: WorkerSettings, rank: int, store: Path) -> subprocess.Popen[bytes]:
    variables = environment(settings) | {"LOCAL_RANK": str(rank)}  # the GPU that transformers uses
    return launch(Command(f"rank {rank}", python_module("worker.node.rank_main", str(store), str(rank)), variables))
