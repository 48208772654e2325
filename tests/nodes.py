"""Worker processes as nodes of a cluster, on the database and queue of the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from jobs.queue.worker_notifier import WorkerNotifier
from jobs.settings import JobsSettings
from jobs.submission.intake import Submission, create_job
from jobs.submission.items import Item
from storage.models import ChoiceOutput, DecodeStep, JobRow, Request, Worker
from storage.session import Database

_DEADLINE_S = 840.0
_PAUSE_S = 0.05


@dataclass(frozen=True)
class Cluster:
    """The database and queue that the nodes of a test share."""

    database_url: str
    redis_url: str
    target: Path | str  # a path, or several with commas between them
    data_dir: Path

    def environment(self, **settings: object) -> dict[str, str]:
        """Return the environment of a worker; `settings` override it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
        told = {"data_dir": self.data_dir, "cache_dir": self.data_dir, "database_url": self.database_url}
        told |= {"redis_url": self.redis_url, "target": self.target, "dtype": "float32", "draft": "suffix"} | settings
        return inherited | {f"BASIC_{name.upper()}": str(value) for name, value in told.items()}

    @contextmanager
    def node(self, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker command inside the block; kill it at the end if it still runs."""
        log = self.data_dir / f"node-{len(list(self.data_dir.glob('node-*')))}.log"
        with log.open("wb") as words:
            environment = self.environment(**settings)
            process = subprocess.Popen([sys.executable, "-m", "worker"], env=environment, stdout=words, stderr=words)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def submit(self, count: int, model: str | None = None, **parameters: Any) -> str:
        """Store a job of `count` requests, as the API server does, and notify the workers."""
        settings = JobsSettings(target=str(self.target), redis_url=self.redis_url)
        items = [Item(number, {"prompt": f"Request {number}"}) for number in range(count)]
        notify = WorkerNotifier(self.redis_url).notify
        database = Database.open(self.database_url)
        try:
            asked = {"temperature": 0, "ignore_eos": True, "cache": False} | parameters
            submission = Submission(items, model, parameters=asked)
            return create_job(submission, database=database, notify=notify, settings=settings)
        finally:
            database.dispose()

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait until `what` returns a true value, and return it."""
        ends_at = time.monotonic() + _DEADLINE_S
        while not (found := what()):
            assert time.monotonic() < ends_at, self.words()
            time.sleep(_PAUSE_S)
        return found

    def words(self) -> str:
        """Return the logs of the nodes."""
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in sorted(self.data_dir.glob("node-*")))

    def workers(self) -> list[Worker]:
        """Return the rows of workers that have not stopped, oldest first."""
        return self._rows(select(Worker).where(Worker.stopped_at.is_(None)).order_by(Worker.started_at))

    def job(self, job_id: str) -> JobRow:
        """Return the row of a job."""
        job: JobRow = self._rows(select(JobRow).where(JobRow.id == job_id))[0]
        return job

    def finished(self, job_id: str) -> JobRow:
        """Wait for a job's end and return its row."""
        self.until(lambda: self.job(job_id).finished_at)
        return self.job(job_id)

    def outputs(self, job_id: str) -> list[ChoiceOutput]:
        """Return the outputs of a job so far, in order."""
        return self._rows(
            select(ChoiceOutput).where(ChoiceOutput.job_id == job_id).order_by(ChoiceOutput.request_index)
        )

    def held(self, worker_id: str) -> int:
        """Return how many requests a worker is decoding."""
        mine = (Request.lease_owner == worker_id, Request.status == "running")
        return int(self._rows(select(func.count()).select_from(Request).where(*mine))[0])

    def attempts(self, job_id: str) -> set[int]:
        """Return how often the requests of a job were claimed."""
        return set(self._rows(select(Request.attempts).where(Request.job_id == job_id)))

    def emitted(self, job_id: str) -> int:
        """Return the tokens that the recorded steps of a job emitted."""
        return int(self._rows(select(func.sum(DecodeStep.emitted_tokens)).where(DecodeStep.job_id == job_id))[0])

    def _rows(self, query: Any) -> list[Any]:
        with self._database.read() as session:
            rows = list(session.scalars(query))
            session.expunge_all()
            return rows

    @cached_property
    def _database(self) -> Database:
        """Keep one connection: connecting for each poll would take CPU time from the nodes."""
        database = Database.open(self.database_url)
        weakref.finalize(self, database.dispose)
        return database
