"""Whether a process of this machine is still there: a kill is seen at once, not when a lease lapses.

An identity names boot, process namespace, process id and the moment of its start, so that neither a restart of the
machine nor a process id that is used again makes a dead process look alive, and no other container of the machine is
judged. Linux only; elsewhere nobody has an identity, and leases tell. A container that starts again has a new process
namespace: there the new process under the old name and number tells of the old one.
"""

from __future__ import annotations

import os
from pathlib import Path

_STATE, _START_TICKS = 0, 19  # fields of /proc/PID/stat behind the name of the program


def identity(pid: int | None = None) -> str | None:
    """Return the identity of a running process (ours, if none is named); None where there are none."""
    pid = os.getpid() if pid is None else pid
    fields = _stat(pid)
    scope = _scope()
    return f"{scope}/{pid}/{fields[_START_TICKS]}" if scope and fields else None


def is_dead(identity: str | None) -> bool:
    """Return whether this process has certainly ended. False for whoever can't be seen from here."""
    scope, _, process = (identity or "").rpartition("/")
    scope, _, pid = scope.rpartition("/")
    if not scope or scope != _scope() or not pid.isdecimal():
        return False
    fields = _stat(int(pid))
    return not fields or fields[_START_TICKS] != process or fields[_STATE] in "ZX"


def follows(later: str | None, earlier: str | None) -> bool:
    """Return whether a process has the number of an earlier one of this boot, in another process namespace.

    If both are of one container, which has one such namespace at a time, then the earlier has ended.
    """
    (boot, namespace, pid), (old_boot, old_namespace, old_pid) = _parts(later), _parts(earlier)
    return bool(boot) and (boot, pid) == (old_boot, old_pid) and namespace != old_namespace


def _parts(identity: str | None) -> tuple[str, str, str]:
    boot, _, rest = (identity or "").partition("/")
    place, _, _ = rest.rpartition("/")
    namespace, _, pid = place.rpartition("/")
    return boot, namespace, pid


def _scope() -> str | None:
    """Return what tells this boot of this machine, and our view of its processes, from all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _stat(pid: int) -> list[str]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return stat.rpartition(")")[2].split()  # the name of the program may hold anything, spaces too
