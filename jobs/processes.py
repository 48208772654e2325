"""Run child processes: restart them when they die, stop them in order, and end them with their parent.

On Linux the kernel kills the children when the parent dies. Other systems can't do that: there, children of a killed
parent must be stopped by hand.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

RESTART_STATUS = 75  # EX_TEMPFAIL of sysexits.h: a restart may help
BAD_SETTINGS_STATUS = 78  # EX_CONFIG of sysexits.h: a restart can't help

_PR_SET_PDEATHSIG = 1
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_STEADY_S = 60.0  # a child that has run this long restarts with the first delay again
_TICK_S = 0.1

# Loaded before any fork, because the forked child must not load libraries.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a child process."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path | None = None  # None: the parent's output
    stop_s: float = 10.0  # time to stop before it is killed
    cpus: frozenset[int] | None = None  # CPU affinity; None: the parent's
    umask: int | None = None  # None: the parent's


class Child:
    """A child process that restarts with exponential backoff when it dies."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.restarts = 0
        self._restart_at: float | None = None
        self._terminated = False
        self._launch()

    @property
    def pid(self) -> int:
        """The current process id."""
        return self._process.pid

    def status(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        return self._process.poll()

    def restart_if_due(self) -> None:
        """Restart the child if it has died and its delay is over."""
        if self.status() is None:
            return
        now = time.monotonic()
        if self._restart_at is None:
            self._restart_at = now + self._delay_s(now)
        elif now >= self._restart_at:
            self.restarts += 1
            self._launch()

    def terminate(self) -> None:
        """Send SIGTERM without waiting; once, because a second one would end a worker in the middle of its drain."""
        if self.status() is None and not self._terminated:
            self._terminated = True
            self._process.terminate()

    def stop(self, at_once: threading.Event) -> None:
        """Stop the child: SIGTERM, then SIGKILL after `stop_s` or when `at_once` is set."""
        self.terminate()
        ends_at = time.monotonic() + self.command.stop_s
        while self.status() is None and time.monotonic() < ends_at and not at_once.is_set():
            time.sleep(_TICK_S)
        if self.status() is None:
            log.warning("Killing %s: it did not stop in time", self.command.name, extra={"action": "child_killed"})
            self._process.kill()
        self._process.wait()

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of the child's log; empty if it writes to the parent's output."""
        return tail(self.command.log_path, lines) if self.command.log_path else ""

    def _launch(self) -> None:
        self._restart_at = None
        self._terminated = False
        self._started_at = time.monotonic()
        self._process = launch(self.command)

    def _delay_s(self, now: float) -> float:
        lived_s = now - self._started_at
        if lived_s >= _STEADY_S:
            self.restarts = 0
        delay_s = min(_FIRST_DELAY_S * 2.0**self.restarts, _LONGEST_DELAY_S)
        log.warning(
            "%s exited with status %s after %.0f s; restarting it in %.1f s. Log: %s",
            self.command.name,
            self.status(),
            lived_s,
            delay_s,
            self.command.log_path or "in this output",
            extra={"action": "child_died", "child": self.command.name},
        )
        return delay_s


class Children:
    """The children of this process, in the order of their start. Start them from the main thread (see `launch`)."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def start(self, command: Command) -> Child:
        """Start a child process and keep it among the children."""
        child = Child(command)
        self._children.append(child)
        return child

    def dead(self) -> Iterator[Child]:
        """Yield the children that are not running."""
        return (child for child in self._children if child.status() is not None)

    def keep_running(self, stop: threading.Event) -> Child | None:
        """Restart children that die, until `stop` is set; return early with a child that exits for bad settings."""
        while not stop.wait(_TICK_S):
            for child in self.dead():
                if child.status() == BAD_SETTINGS_STATUS:
                    return child
                child.restart_if_due()
        return None

    def stop(self, at_once: threading.Event, *, together: bool = False) -> None:
        """Stop all children, last started first, because each depends on those before it.

        `at_once` set: kill them. `together`: send SIGTERM to all first, if they don't depend on each other.
        """
        for child in self._children if together else ():
            child.terminate()
        while self._children:
            self._children.pop().stop(at_once)


def launch(command: Command) -> subprocess.Popen[bytes]:
    """Start a process that dies with this one.

    Call this from the main thread, because the kernel sends the death signal when the forking thread ends. The child
    gets its own process group, so that Ctrl-C reaches only the parent, which stops its children in order.
    """
    with command.log_path.open("ab") if command.log_path else nullcontext() as log_file, _on(command.cpus):
        return subprocess.Popen(
            command.arguments,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT if log_file else None,
            process_group=0,
            umask=-1 if command.umask is None else command.umask,
            preexec_fn=parent_death_hook(os.getpid()),
        )


@contextmanager
def _on(cpus: frozenset[int] | None) -> Iterator[None]:
    """Set the CPU affinity of this thread inside the block; a forked child inherits it."""
    if cpus is None or not hasattr(os, "sched_setaffinity"):  # not Linux
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parent_death_hook(parent_pid: int) -> Callable[[], None] | None:
    """Return a `preexec_fn` that lets the kernel kill the child with its parent; None if this is not Linux.

    The signal is SIGKILL: all our processes survive being killed at any time, and a hung child can't ignore it. The
    function runs between fork and exec, so it must take no lock: it only makes two system calls.
    """
    libc = _libc
    if libc is None:
        return None

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent died before prctl, so no signal would arrive
            os._exit(1)

    return die_with_parent


@contextmanager
def stop_signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Yield two events for SIGINT, SIGTERM and SIGHUP: the first signal sets `stop`, a second one sets `at_once`."""
    stop, at_once = threading.Event(), threading.Event()

    def receive(_number: int, _frame: object) -> None:
        (at_once if stop.is_set() else stop).set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, receive) for number in numbers]
    try:
        yield stop, at_once
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def python_module(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module with this Python interpreter.

    -P keeps the current folder off `sys.path`: a user's own `worker.py` or `storage.py` there would hide our packages.
    """
    return (sys.executable, "-P", "-m", module, *arguments)


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a text file; an empty string if it does not exist."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def rotate_logs(paths: Sequence[Path]) -> None:
    """Rename the logs of the previous run to `*.1`, so that each log covers one run."""
    for path in paths:
        if path.exists():
            path.replace(path.with_name(path.name + ".1"))
