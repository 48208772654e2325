"""Run jobs while things break, and check that nothing was lost, doubled or changed: `make chaos`.

    python -m tests.chaos.run --faults 50 --database postgresql

Decode the prompts once without faults. Then submit the same prompts again and again, over HTTP and through Redis, while
faults are injected one after the other. At the end every request must have exactly one output or error row, greedy
texts must be those of the first run, step rows must sum to the tokens, and a webhook must have been told of the end of
every job. Exit status 0 if all of this holds.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from jobs.errors import QueueUnavailable
from jobs.messages import PromptBatch
from jobs.producer import batch_job_id, push
from tests.chaos.faults import Fault, faults_for, small_disk
from tests.chaos.stack import Stack
from tests.postgres import Postgres
from tests.receiver import Receiver, a_receiver

REQUESTS = 12
MAX_TOKENS = 160
_PAUSE_S = (0.5, 4.0)  # between two faults
_END_S = 840.0
_OPEN_JOBS = 3  # jobs that run at any time


@dataclass
class Report:
    """Injected faults and violated laws of one run."""

    database: str
    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    requests: int = 0
    outputs: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    events: int = 0  # that the webhook received, repeated ones included
    claims: int = 0
    tokens: int = 0
    run_s: float = 0.0
    recovery_s: float = 0.0  # from the last fault to the end of the last job
    wrong: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON."""
        return {**vars(self), "faults": dict(self.faults.most_common()), "fault_count": self.faults.total()}


class Chaos:
    """One chaos run on one stack."""

    def __init__(self, stack: Stack, faults: dict[str, Fault], seed: int, database: str, receiver: Receiver) -> None:
        self.stack = stack
        self.receiver = receiver
        self.faults = faults
        self.dice = random.Random(seed)
        self.report = Report(database, seed)
        self.prompts = [f"{number}: {'once upon a time ' * (1 + number % 4)}" for number in range(REQUESTS)]
        self.expected: list[str] = []
        self.job_ids: list[str] = []
        self._unsent: list[str] = []  # idempotency keys of submissions that are not confirmed yet

    def run(self, count: int) -> Report:
        """Decode without faults, inject `count` faults, and check the laws."""
        hook = {"url": self.receiver.url, "event_types": ["batch.completed"]}
        added = httpx.post(f"{self.stack.api_url}/v1/webhook_endpoints", json=hook, timeout=15, trust_env=False)
        assert added.status_code == 200, added.text
        self.expected = self._undisturbed()
        began_at = time.monotonic()
        for _ in range(count):
            self._keep_busy()
            self.stack.rest(self.dice.uniform(*_PAUSE_S))
            self._strike()
        struck_at = time.monotonic()
        self._finish("the end of the jobs")
        self.stack.wait_for(lambda: self._told() >= set(self.job_ids), "the events of the ends of the jobs", _END_S)
        self.report.recovery_s = round(time.monotonic() - struck_at, 1)
        self.report.run_s = round(time.monotonic() - began_at, 1)
        self._check()
        return self.report

    def _told(self) -> set[str]:
        """Return the ids of the jobs whose end has been told."""
        return {json.loads(body)["data"]["id"] for _, body in self.receiver.received[:]}

    def _undisturbed(self) -> list[str]:
        self._send(uuid.UUID(int=self.dice.getrandbits(128)).hex)
        self._finish("the undisturbed job")
        rows = self.stack.rows(
            "SELECT text FROM outputs WHERE job_id = :job ORDER BY request_index", job=self.job_ids[0]
        )
        assert len(rows) == REQUESTS
        return [str(text) for (text,) in rows]

    def _finish(self, what: str) -> None:
        """Wait until every submission is confirmed and every job has ended."""
        while self._unsent:
            self._send(self._unsent.pop(0))
            self.stack.rest(0.2)
        self.stack.wait_for(self._all_over, what, _END_S)

    def _keep_busy(self) -> None:
        """Keep `_OPEN_JOBS` jobs running; send unconfirmed submissions again, with the same key."""
        for key in self._unsent[:]:
            self._unsent.remove(key)
            self._send(key)
        while len(self._unsent) + self._open() < _OPEN_JOBS:
            self._send(uuid.UUID(int=self.dice.getrandbits(128)).hex)

    def _send(self, key: str) -> None:
        """Submit the prompts over HTTP or Redis; a key always takes the same of the two."""
        job_id = self._push(key) if int(key, 16) % 2 else self._post(key)
        if job_id is None:
            self._unsent.append(key)
        elif job_id not in self.job_ids:
            self.job_ids.append(job_id)

    def _post(self, key: str) -> str | None:
        body = {"prompts": self.prompts, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        try:
            reply = httpx.post(
                f"{self.stack.api_url}/v1/jobs",
                json=body,
                headers={"idempotency-key": key},
                timeout=15,
                trust_env=False,
            )
        except httpx.TransportError:
            return None
        if reply.status_code in (429, 503, 507):
            return None
        assert reply.status_code == 200, reply.text
        return str(reply.json()["id"])

    def _push(self, key: str) -> str | None:
        parameters = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        batch = PromptBatch(id=key, requests=tuple(self.prompts), parameters=parameters)
        job_id = batch_job_id(key)
        if self.stack.rows("SELECT 1 FROM jobs WHERE id = :job", job=job_id):
            return job_id
        with suppress(QueueUnavailable):
            push(batch, self.stack.redis_url)
        return None  # accepted means stored in SQL: look again later

    def _strike(self) -> None:
        # As many of each kind as the count allows, in random order.
        rarest = min(self.report.faults[name] for name in self.faults)
        name = self.dice.choice([name for name in self.faults if self.report.faults[name] == rarest])
        print(f"{self.report.faults.total() + 1:3d}  {name}", flush=True)
        self.report.faults[name] += 1
        self.faults[name](self.stack, self.dice)

    def _open(self) -> int:
        ((count,),) = self.stack.rows("SELECT count(*) FROM jobs WHERE status = 'in_progress'")
        return int(str(count))

    def _all_over(self) -> bool:
        return not self._unsent and bool(self.job_ids) and self._open() == 0

    def _check(self) -> None:
        report, stack = self.report, self.stack
        recorded = {str(job) for (job,) in stack.rows("SELECT id FROM jobs")}
        report.jobs = len(recorded)
        self._demand(recorded == set(self.job_ids), f"jobs sent {len(self.job_ids)}, recorded {len(recorded)}")
        rows = stack.rows("SELECT job_id, request_index, status, error_code, lease_number FROM requests")
        outputs = stack.rows("SELECT job_id, request_index, text, completion_tokens FROM outputs")
        written = Counter((job, index) for job, index, _, _ in outputs)
        report.requests, report.outputs = len(rows), len(outputs)
        report.events = len(self.receiver.received)
        self._demand(self._told() == recorded, "events of other jobs, or none of some")
        report.claims = sum(int(str(row[4])) for row in rows)
        report.tokens = sum(int(str(row[3])) for row in outputs)
        report.errors = dict(Counter(str(row[3]) for row in rows if row[3] is not None))
        self._demand(len(rows) == report.jobs * REQUESTS, f"{len(rows)} requests of {report.jobs} jobs")
        for job, index, status, error, _ in rows:
            has = (written[job, index], error is not None)
            self._demand(has in ((1, False), (0, True)), f"{job} {index}: {status}, {has[0]} outputs, error {error}")
        for job, index, text, _ in outputs:
            self._demand(text == self.expected[int(str(index))], f"{job} {index}: another text")
        emitted = {
            (job, index): int(str(count))
            for job, index, count in stack.rows(
                "SELECT job_id, request_index, sum(emitted_tokens) FROM decode_steps GROUP BY job_id, request_index"
            )
        }
        tokens = {(job, index): count for job, index, _, count in outputs}
        self._demand(emitted == tokens, "step rows do not add up to the completion tokens")
        left = stack.rows(
            "SELECT count(*) FROM partials p JOIN requests r"
            " ON r.job_id = p.job_id AND r.request_index = p.request_index WHERE r.status = 'completed'"
        )
        self._demand(left == [(0,)], f"{left} checkpoints of completed requests")
        counted = stack.rows("SELECT sum(requests_completed), sum(requests_failed) FROM jobs")
        done = sum(1 for row in rows if row[2] == "completed")
        failed = sum(1 for row in rows if row[2] == "failed")
        self._demand([tuple(map(int, map(str, counted[0])))] == [(done, failed)], f"jobs count {counted}")

    def _demand(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.report.wrong.append(otherwise)


def run(count: int, database: str, seed: int, only: list[str] | None = None, target: Path | None = None) -> Report:
    """Start a service, inject `count` faults, and return the report."""
    with ExitStack() as cleanup:
        directory = Path(tempfile.mkdtemp(prefix="basic-chaos-"))
        disk = cleanup.enter_context(small_disk(directory / "disk")) if database == "sqlite" else False
        postgres = None
        if database == "postgresql":
            postgres = Postgres()
            cleanup.callback(postgres.remove)
            postgres.start()
        stack = Stack(directory, target or tiny_model(directory / "tiny"), postgres)
        cleanup.callback(stack.stop)
        stack.start()
        faults = faults_for(postgres=postgres is not None, small_disk=disk)
        chosen = {name: fault for name, fault in faults.items() if only is None or name in only}
        receiver = cleanup.enter_context(a_receiver())
        return Chaos(stack, chosen, seed, database, receiver).run(count)


def tiny_model(directory: Path) -> Path:
    """Save a tiny random model with its tokenizer."""
    from tests.models import save_tiny

    return save_tiny(directory)


def main() -> int:
    """Run with the options of the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="names of faults, separated by commas")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    only = arguments.only.split(",") if arguments.only else None
    report = run(arguments.faults, arguments.database, arguments.seed, only)
    print(json.dumps(report.as_json(), indent=2))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
