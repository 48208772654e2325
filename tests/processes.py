"""Looking at processes from outside: who started whom, and waiting for an end that is not our child's."""

from __future__ import annotations

import os
import select
from pathlib import Path


def ended(pid: int, timeout_s: float = 10.0) -> bool:
    """Wait until a process has ended, anybody's child, and return whether it did in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started and that are still there."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
