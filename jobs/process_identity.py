"""Detect dead processes of this machine immediately, instead of waiting for their leases to lapse.

An identity consists of boot id, PID namespace, process id and start time, so that a reboot or a reused process id
can't make a dead process look alive, and processes of other containers are not judged. A restarted container has a new
PID namespace; `follows` recognises its processes. Linux only: elsewhere there are no identities, only leases.
"""

from __future__ import annotations

import os
from pathlib import Path

_STATE, _START_TICKS = 0, 19  # fields of /proc/PID/stat after the program's name


def identity(pid: int | None = None) -> str | None:
    """Return the identity of a process (default: this one); None if it is not running or this is not Linux."""
    pid = os.getpid() if pid is None else pid
    fields = _stat(pid)
    scope = _scope()
    return f"{scope}/{pid}/{fields[_START_TICKS]}" if scope and fields else None


def is_dead(identity: str | None) -> bool:
    """Return True if the process has certainly ended; False if it runs or can't be seen from here."""
    scope, _, process = (identity or "").rpartition("/")
    scope, _, pid = scope.rpartition("/")
    if not scope or scope != _scope() or not pid.isdecimal():
        return False
    fields = _stat(int(pid))
    return not fields or fields[_START_TICKS] != process or fields[_STATE] in "ZX"


def follows(later: str | None, earlier: str | None) -> bool:
    """Return whether two processes of one boot have the same process id in different PID namespaces.

    If both belong to the same container, then it was restarted and the earlier process has ended.
    """
    (boot, namespace, pid), (old_boot, old_namespace, old_pid) = _parts(later), _parts(earlier)
    return bool(boot) and (boot, pid) == (old_boot, old_pid) and namespace != old_namespace


def _parts(identity: str | None) -> tuple[str, str, str]:
    boot, _, rest = (identity or "").partition("/")
    scope, _, _ = rest.rpartition("/")
    namespace, _, pid = scope.rpartition("/")
    return boot, namespace, pid


def _scope() -> str | None:
    """Return `BOOT_ID/PID_NAMESPACE` of this process; None if this is not Linux."""
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
    return stat.rpartition(")")[2].split()  # the program's name may contain spaces and parentheses
