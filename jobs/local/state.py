"""What an embedded service leaves in its data directory for others to find: the lock and `up.json`.

The lock says whether a service runs, because the kernel drops it however its owner ends; `up.json` only says where.
Knows files, nothing of the work of the processes.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.errors import SetupError
from jobs.local.private_files import private, write_private

_PROBES = 5  # a reader's probe holds the lock for an instant; that is not another owner
_PROBE_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class LocalService:
    """Where a running embedded service is."""

    api_url: str
    redis_url: str
    database_url: str
    data_dir: str
    pid: int  # of the parent of all its processes


@contextmanager
def owned(data_dir: Path) -> Iterator[None]:
    """Own the data directory, or raise SetupError naming the owner. Whatever a crashed owner left is cleared."""
    with open(_lock_path(data_dir), "a+", opener=private) as lock:
        if not _try_lock(lock.fileno()):
            raise SetupError(
                f"another `basic up` (process {owner(data_dir) or 'unknown'}) runs on {data_dir}; "
                "stop it with `basic down`, or set BASIC_DATA_DIR to another directory"
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _service_path(data_dir).unlink(missing_ok=True)
        try:
            yield
        finally:
            _service_path(data_dir).unlink(missing_ok=True)


def owner(data_dir: Path) -> int | None:
    """Return the process that owns the data directory, None if nobody does."""
    try:
        with _lock_path(data_dir).open("r") as lock:
            if _probe(lock.fileno()):
                return None
            return int(lock.read() or 0) or None
    except FileNotFoundError:
        return None


def announce_service(service: LocalService) -> None:
    """Write `up.json`, in one piece, for its owner's eyes: the URLs may carry passwords."""
    write_private(_service_path(Path(service.data_dir)), json.dumps(asdict(service), indent=2) + "\n")


def running(data_dir: Path) -> LocalService | None:
    """Return the service that runs on this data directory; None if there is none, or it is still starting."""
    pid = owner(data_dir)
    try:
        service = LocalService(**json.loads(_service_path(data_dir).read_text()))
    except FileNotFoundError:
        return None
    return service if service.pid == pid else None


def _lock_path(data_dir: Path) -> Path:
    return data_dir / "up.lock"


def _service_path(data_dir: Path) -> Path:
    return data_dir / "up.json"


def _try_lock(descriptor: int) -> bool:
    for _ in range(_PROBES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PROBE_PAUSE_S)
        else:
            return True
    return False


def _probe(descriptor: int) -> bool:
    """Return whether the lock is free. It is taken for an instant and dropped when the file closes."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
