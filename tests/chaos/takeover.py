"""Measure how long requests of a killed worker wait, with the default lease: `python -m tests.chaos.takeover`.

Time from the kill to the claim by another worker with free slots. Once on one machine, where other processes detect the
death at once; and once with the killed worker in its own PID namespace, as on another machine: then its requests wait
until their leases lapse. The second case needs root.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.request_process import MODULE
from tests.chaos.run import tiny_model
from tests.chaos.stack import Stack
from tests.integration.test_worker_process import rows, submit
from tests.processes import child_that_runs

RUNS = 3


def measure(*, apart: bool) -> list[float]:
    """Return the takeover time of each run, in seconds."""
    directory = Path(tempfile.mkdtemp(prefix="basic-takeover-"))
    stack = Stack(directory, tiny_model(directory / "tiny"), None, step_s=0.1)
    del stack.environment["BASIC_LEASE_S"]
    prefix = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child") if apart else ()
    taken: list[float] = []
    try:
        stack.start(doors=False, victim_prefix=prefix)
        for run in range(RUNS):
            taken.append(_once(stack, f"job-{run}", apart=apart))
    finally:
        stack.stop()
    return taken


def _once(stack: Stack, job_id: str, *, apart: bool) -> float:
    """Start a job on one worker, start the other, kill the first, and wait for the takeover."""
    stack.down.add("worker-1")
    stack.kill("worker-1")
    stack.children["worker-1"]._process.wait()
    submit(stack, job_id, "one", "two", max_tokens=400)
    stack.wait_for(lambda: {row[0] for row in rows(stack, job_id)} == {"running"}, "the claim")
    known = _workers(stack)
    stack.down.clear()
    stack.wait_for(lambda: _workers(stack) > known, "the other worker")
    stack.rest(2.0)
    stack.down.add("worker-0")
    assert {row[0] for row in rows(stack, job_id)} == {"running"}, "the victim was too quick"
    victim = stack.children["worker-0"].pid
    killed_at = time.monotonic()
    os.kill(child_that_runs(MODULE, victim) if apart else victim, signal.SIGKILL)
    stack.wait_for(lambda: all(row[2] == 2 for row in rows(stack, job_id)), "the second claim")
    took_s = time.monotonic() - killed_at
    stack.wait_for(lambda: all(row[0] == "completed" for row in rows(stack, job_id)), "the end of the job")
    known = _workers(stack)
    stack.down.clear()
    stack.wait_for(lambda: _workers(stack) > known, "the victim's successor")
    return round(took_s, 1)


def _workers(stack: Stack) -> int:
    return len(stack.rows("SELECT id FROM workers"))


def main() -> int:
    """Measure and print."""
    found = {"one machine": measure(apart=False)}
    if os.geteuid() == 0:
        found["another machine"] = measure(apart=True)
    print(json.dumps({"seconds_to_the_next_claim": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
