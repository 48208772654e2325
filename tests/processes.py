"""Observe processes: their children, and the end of processes that are not our children."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from pathlib import Path


def ended(pid: int, timeout_s: float = 60.0) -> bool:
    """Wait until a process has ended, child or not; return False at the timeout."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def children_of(pid: int) -> list[int]:
    """Return the running children of a process, of any of its threads."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def child_that_runs(module: str, pid: int) -> int:
    """Return the child of a process that runs a Python module; raise LookupError if there is none.

    A process may have other children for a moment: a compiler, `uname`, or a copy of itself that is about to run one.
    """
    for child in children_of(pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                return child
    raise LookupError(f"No child of process {pid} runs {module}.")
