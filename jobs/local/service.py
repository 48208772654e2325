"""Embedded mode: run the whole service on this machine, as child processes that share one data directory.

The children are the same programs as on a cluster. Ctrl-C or `basic down` stops all of them, and they die with their
parent. The next start continues the unfinished jobs in the database.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from jobs.errors import BasicError, ChildRefused, SetupError
from jobs.local.private_files import make_private, private_files, private_opener
from jobs.local.startup import Startup, StartupStopped, print_status
from jobs.local.state import LocalService, data_dir_lock, lock_owner, running_service, write_service
from jobs.logs import log_to_stderr
from jobs.processes import BAD_SETTINGS_STATUS, Child, Children, python_module, rotate_logs, stop_signals, tail
from jobs.settings import JobsSettings, environment, read_settings

_TICK_S = 0.1
_STOP_TIMEOUT_S = 60.0  # then the service is killed; each child has a shorter timeout of its own
_MIN_FREE_BYTES = 200_000_000


def up(settings: JobsSettings, *, announce: Callable[[LocalService], None]) -> int:
    """Run the service until a signal stops it and return the exit status. Call `announce` when all parts answer.

    Raise SetupError if it can't start; no child is left running then.
    """
    settings = _prepare_data_dir(settings)
    with private_files() as umask, data_dir_lock(settings.data_dir), stop_signals() as (stop, at_once):
        children = Children()
        try:
            service = Startup(settings, children, stop, umask).run()
            write_service(service)
            announce(service)
            return _exit_status(children.keep_running(stop))
        except StartupStopped:
            return 0
        finally:
            children.stop(at_once)


def start_detached(settings: JobsSettings) -> LocalService:
    """Start the service in the background and return when it answers. If one is running, return that one."""
    settings = _prepare_data_dir(settings)
    service = running_service(settings.data_dir)
    if service is not None:
        return service
    log_path = settings.data_dir / "logs" / "up.log"
    rotate_logs([log_path])
    with open(log_path, "ab", opener=private_opener) as log_file:
        process = subprocess.Popen(
            python_module("jobs.local.service"),
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _wait_for_start(process, settings.data_dir, log_path)


def down(data_dir: Path) -> bool:
    """Stop the service of this data directory, also while it is starting. Return False if there is none."""
    pid = lock_owner(data_dir)
    if pid is None:
        return False
    _send(pid, signal.SIGTERM)
    ends_at = time.monotonic() + _STOP_TIMEOUT_S
    while lock_owner(data_dir) == pid:
        if time.monotonic() > ends_at:
            _send(pid, signal.SIGKILL)  # its children die with it
        time.sleep(_TICK_S)
    return True


def _prepare_data_dir(settings: JobsSettings) -> JobsSettings:
    """Create the data directory, check that it is writable and has free space, and return settings with its full path.

    Files of earlier runs become private.
    """
    data_dir = settings.data_dir.resolve()
    _refuse_undecodable_name(data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (data_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        make_private(data_dir)
        statistics = os.statvfs(data_dir)
    except OSError as exc:
        raise SetupError(f"can't use the data directory {data_dir}: {exc.strerror}; set BASIC_DATA_DIR") from exc
    if not os.access(data_dir, os.W_OK):
        raise SetupError(f"the data directory {data_dir} can't be written; set BASIC_DATA_DIR to one of yours")
    free_bytes = statistics.f_bavail * statistics.f_frsize
    if free_bytes < _MIN_FREE_BYTES:
        raise SetupError(
            f"the disk of {data_dir} has only {free_bytes // 10**6} MB free; "
            "free some space, or set BASIC_DATA_DIR to a directory on another disk"
        )
    return settings.model_copy(update={"data_dir": data_dir})


def _refuse_undecodable_name(data_dir: Path) -> None:
    """Refuse a path that is not valid UTF-8: SQLite needs UTF-8 file names."""
    try:
        str(data_dir).encode()
    except UnicodeEncodeError as exc:
        raise SetupError(f"the name of the data directory {data_dir!a} is not UTF-8; set BASIC_DATA_DIR") from exc


def _exit_status(failed: Child | None) -> int:
    if failed is None:
        return 0
    print_status(f"{failed.command.name} failed because of its settings:\n{failed.log_tail()}")
    return BAD_SETTINGS_STATUS


def _wait_for_start(process: subprocess.Popen[bytes], data_dir: Path, log_path: Path) -> LocalService:
    """Print the log of the starting service until it answers or has exited."""
    try:
        with log_path.open(errors="replace") as log:
            while process.poll() is None:
                sys.stderr.write(log.read())
                service = running_service(data_dir)
                if service is not None:
                    process.returncode = 0  # or Popen warns about a running child when it is deleted
                    return service
                time.sleep(_TICK_S)
    except KeyboardInterrupt:
        process.terminate()  # Ctrl-C does not reach another session
        process.wait()
        raise
    kind = ChildRefused if process.returncode == BAD_SETTINGS_STATUS else SetupError
    raise kind(f"the service did not start:\n{tail(log_path, 20)}")


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has exited meanwhile
    except PermissionError as exc:
        raise SetupError(f"process {pid} belongs to another user, who must stop it") from exc


def main() -> int:
    """Run the service with the settings of the environment. `start_detached` starts this process."""
    try:
        settings = read_settings(JobsSettings)
        log_to_stderr(settings.log_format, logging.WARNING)
        return up(settings, announce=lambda _: None)
    except BasicError as exc:
        print_status(str(exc))
        return BAD_SETTINGS_STATUS


__all__ = ["LocalService", "down", "running_service", "start_detached", "up"]

if __name__ == "__main__":
    sys.exit(main())
