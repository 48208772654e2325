"""Embedded mode: the whole service on this machine, below one data directory, as children of one process.

Each child is the program that runs on a cluster; only the addresses are chosen here. Ctrl-C or `basic down` stops them
all, a crash takes them along, and the next start goes on with what SQL says is unfinished.
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
from jobs.local.private_files import private, private_files, tighten
from jobs.local.startup import Start, Stopped, environment, say
from jobs.local.state import LocalService, announce_service, owned, owner, running
from jobs.logs import log_to_stderr
from jobs.processes import BAD_SETTINGS_STATUS, Child, Children, python_module, rotate_logs, stop_signals, tail
from jobs.settings import JobsSettings, read_settings

_TICK_S = 0.1
_DOWN_S = 60.0  # within which a service must have stopped; each child has its own, shorter time
_NEEDED_BYTES = 200_000_000


def up(settings: JobsSettings, *, announce: Callable[[LocalService], None]) -> int:
    """Run the service until a signal stops it and return the exit status; `announce` hears of it when all answers.

    Raise SetupError if it can't start: nothing is left running then.
    """
    settings = _at_home(settings)
    with private_files() as umask, owned(settings.data_dir), stop_signals() as (stop, at_once):
        children = Children()
        try:
            service = Start(settings, children, stop, umask).run()
            announce_service(service)
            announce(service)
            return _report(children.keep_running(stop))
        except Stopped:
            return 0
        finally:
            children.stop(at_once)


def start_detached(settings: JobsSettings) -> LocalService:
    """Start the service as a process of its own and return when it answers; return the running one if there is one."""
    settings = _at_home(settings)
    service = running(settings.data_dir)
    if service is not None:
        return service
    log_path = settings.data_dir / "logs" / "up.log"
    rotate_logs([log_path])
    with open(log_path, "ab", opener=private) as log_file:
        process = subprocess.Popen(
            python_module("jobs.local.service"),
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _follow_start(process, settings.data_dir, log_path)


def down(data_dir: Path) -> bool:
    """Stop the service of this data directory, started or still starting; return False if there is none."""
    pid = owner(data_dir)
    if pid is None:
        return False
    _send(pid, signal.SIGTERM)
    ends_at = time.monotonic() + _DOWN_S
    while owner(data_dir) == pid:
        if time.monotonic() > ends_at:
            _send(pid, signal.SIGKILL)  # its children die with it
        time.sleep(_TICK_S)
    return True


def _at_home(settings: JobsSettings) -> JobsSettings:
    """Return the settings with an absolute data directory that exists, can be written and has some room.

    What lies there from earlier runs is closed to other users.
    """
    data_dir = settings.data_dir.resolve()
    _refuse_unwritable_name(data_dir)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        (data_dir / "logs").mkdir(mode=0o700, exist_ok=True)
        tighten(data_dir)
        statistics = os.statvfs(data_dir)
    except OSError as exc:
        raise SetupError(f"can't use the data directory {data_dir}: {exc.strerror}; set BASIC_DATA_DIR") from exc
    if not os.access(data_dir, os.W_OK):
        raise SetupError(f"the data directory {data_dir} can't be written; set BASIC_DATA_DIR to one of yours")
    free_bytes = statistics.f_bavail * statistics.f_frsize
    if free_bytes < _NEEDED_BYTES:
        raise SetupError(
            f"the disk of {data_dir} has {free_bytes // 10**6} MB free, too little to record jobs; "
            "free some space, or set BASIC_DATA_DIR to a directory on another disk"
        )
    return settings.model_copy(update={"data_dir": data_dir})


def _refuse_unwritable_name(data_dir: Path) -> None:
    """Refuse bytes that are no text: SQLite takes file names as UTF-8."""
    try:
        str(data_dir).encode()
    except UnicodeEncodeError as exc:
        raise SetupError(f"the name of the data directory {data_dir!a} is not UTF-8; set BASIC_DATA_DIR") from exc


def _report(hopeless: Child | None) -> int:
    if hopeless is None:
        return 0
    say(f"{hopeless.command.name} says its settings can't work:\n{hopeless.log_tail()}")
    return BAD_SETTINGS_STATUS


def _follow_start(process: subprocess.Popen[bytes], data_dir: Path, log_path: Path) -> LocalService:
    """Pass on what the starting service says, until it answers or is gone."""
    try:
        with log_path.open(errors="replace") as words:
            while process.poll() is None:
                sys.stderr.write(words.read())
                service = running(data_dir)
                if service is not None:
                    process.returncode = 0  # it is on its own now; Popen knows no other way to let a child go
                    return service
                time.sleep(_TICK_S)
    except KeyboardInterrupt:
        process.terminate()  # it has a session of its own, so Ctrl-C did not reach it
        process.wait()
        raise
    kind = ChildRefused if process.returncode == BAD_SETTINGS_STATUS else SetupError
    raise kind(f"the service did not start:\n{tail(log_path, 20)}")


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended between our look and our signal
    except PermissionError as exc:
        raise SetupError(f"process {pid} runs the service and belongs to another user; only they can stop it") from exc


def main() -> int:
    """Run the service as the environment says; the process behind `start_detached`."""
    try:
        settings = read_settings(JobsSettings)
        log_to_stderr(settings.log_format, logging.WARNING)
        return up(settings, announce=lambda _: None)
    except BasicError as exc:
        say(str(exc))
        return BAD_SETTINGS_STATUS


__all__ = ["LocalService", "down", "running", "start_detached", "up"]

if __name__ == "__main__":
    sys.exit(main())
