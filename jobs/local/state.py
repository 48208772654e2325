"""The lock and `up.json` in the data directory: whether an embedded service runs, and at which addresses.

Only the lock tells whether a service runs: the kernel releases it even if the owner is killed.
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
from jobs.local.private_files import private_opener, write_private

_LOCK_ATTEMPTS = 5  # a process that only probes the lock may hold it for an instant
_LOCK_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class LocalService:
    """Addresses of a running embedded service."""

    api_url: str
    redis_url: str
    database_url: str
    data_dir: str
    pid: int  # of the parent process


@contextmanager
def data_dir_lock(data_dir: Path) -> Iterator[None]:
    """Lock the data directory, or raise SetupError that names the owner. Remove the `up.json` of a crashed owner."""
    with open(_lock_path(data_dir), "a+", opener=private_opener) as lock:
        if not _try_lock(lock.fileno()):
            raise SetupError(
                f"another `basic up` (process {lock_owner(data_dir) or 'unknown'}) runs on {data_dir}; "
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


def lock_owner(data_dir: Path) -> int | None:
    """Return the process id of the lock's owner, None if the data directory is not locked."""
    try:
        with _lock_path(data_dir).open("r") as lock:
            if _is_unlocked(lock.fileno()):
                return None
            return int(lock.read() or 0) or None
    except FileNotFoundError:
        return None


def write_service(service: LocalService) -> None:
    """Write `up.json` atomically and readable only by its owner: the URLs may contain passwords."""
    write_private(_service_path(Path(service.data_dir)), json.dumps(asdict(service), indent=2) + "\n")


def running_service(data_dir: Path) -> LocalService | None:
    """Return the service that runs on this data directory, None if there is none or it is still starting."""
    pid = lock_owner(data_dir)
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
    for _ in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


def _is_unlocked(descriptor: int) -> bool:
    """Return whether the lock is free. Takes it until the caller closes the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
