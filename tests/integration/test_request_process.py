"""A real worker process whose request process dies or hangs: nothing is lost or doubled, and the worker continues."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.request_process import DEADLY_TEXT, ENDLESS_TEXT, MODULE
from tests.chaos.stack import Stack
from tests.integration.test_worker_process import ended, rows, submit, text_of
from tests.processes import child_that_runs
from tests.processes import ended as process_ended


@pytest.fixture
def stack(tmp_path: Path, tiny_target: Path) -> Iterator[Stack]:
    made = Stack(tmp_path / "stack", tiny_target, None, workers=1, step_s=0.01)
    yield made
    made.stop()


def log_of(stack: Stack) -> str:
    return (stack.directory / "worker-0.log").read_text()


def request_process(stack: Stack) -> int:
    return child_that_runs(MODULE, stack.children["worker-0"].pid)


def test_a_killed_request_process_is_replaced_and_its_requests_go_on_with_the_same_text(stack: Stack) -> None:
    stack.start(doors=False)
    submit(stack, "undisturbed", "one", "two", max_tokens=400)
    stack.wait_for(lambda: ended(stack, "undisturbed"), "the undisturbed job")
    worker = stack.children["worker-0"].pid
    submit(stack, "job", "one", "two", max_tokens=400)
    stack.wait_for(lambda: bool(stack.rows("SELECT 1 FROM partials WHERE job_id = 'job'")), "the first tokens")
    os.kill(request_process(stack), signal.SIGKILL)

    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")

    assert stack.children["worker-0"].pid == worker, "the worker itself continues"
    assert text_of(stack, "job") == text_of(stack, "undisturbed")
    assert [row[:2] for row in rows(stack, "job")] == [("completed", None)] * 2
    emitted = "SELECT sum(emitted_tokens) FROM decode_steps WHERE job_id = 'job'"
    assert stack.rows(emitted) == [(800,)]
    assert "The request process exited with status -9" in log_of(stack)


def test_the_request_process_loads_no_torch(stack: Stack) -> None:
    stack.start(doors=False)
    submit(stack, "job", "one")
    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")

    assert "libtorch" not in Path(f"/proc/{request_process(stack)}/maps").read_text()


def test_a_killed_worker_takes_its_request_process_along(stack: Stack) -> None:
    stack.start(doors=False)
    child = request_process(stack)
    stack.down.add("worker-0")
    stack.kill("worker-0")
    assert process_ended(child)


def test_a_request_that_kills_its_request_process_is_failed_and_its_neighbours_are_served(stack: Stack) -> None:
    stack.start(doors=False)
    worker = stack.children["worker-0"].pid
    submit(stack, "job", "one", "two", DEADLY_TEXT)

    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")

    assert [row[:2] for row in rows(stack, "job")] == [("completed", None), ("completed", None), ("failed", "poison")]
    assert stack.children["worker-0"].pid == worker
    assert stack.rows("SELECT count(*) FROM workers WHERE lost_at IS NOT NULL") == [(0,)]


@pytest.mark.long
def test_a_request_process_that_hangs_is_replaced(stack: Stack) -> None:
    stack.environment |= {"BASIC_STALL_S": "4"}
    stack.start(doors=False)
    worker = stack.children["worker-0"].pid
    submit(stack, "hanging", ENDLESS_TEXT)
    stack.wait_for(lambda: "The request process hangs and is killed" in log_of(stack), "the watchdog")
    submit(stack, "job", "one")

    stack.wait_for(lambda: ended(stack, "job"), "the end of the job")
    stack.wait_for(lambda: ended(stack, "hanging"), "the end of the hanging request")

    assert stack.children["worker-0"].pid == worker
    assert [row[:2] for row in rows(stack, "hanging")] == [("failed", "poison")]
