"""Observe processes: their children, and the end of processes that are not our children."""

from __future__ import annotations

import os
import select
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
