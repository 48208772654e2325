"""Child processes that can't outlive their parent, and the group that keeps them running and stops them in order.

Knows commands, logs and signals; nothing of Redis, SQL or HTTP. Linux kills the children with their parent; other
systems have no such call, so there a killed parent leaves its children to be stopped by hand.
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

RESTART_STATUS = 75  # EX_TEMPFAIL of sysexits.h: another start may work
BAD_SETTINGS_STATUS = 78  # EX_CONFIG of sysexits.h: another start would end the same way

_PR_SET_PDEATHSIG = 1
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_STEADY_S = 60.0  # a child that lived so long starts again without delay
_TICK_S = 0.1

# Looked up before any fork: the child may only make the call.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a child: its name in messages, its arguments, its environment and where its words go."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log_path: Path | None = None  # none: the parent's own output
    stop_s: float = 10.0  # time it gets to stop by itself
    cpus: frozenset[int] | None = None  # where it may run; none: where its parent may
    umask: int | None = None  # rights its files don't have; none: those its parent's don't have


class Child:
    """One running child, started again after growing delays when it dies."""

    def __init__(self, command: Command) -> None:
        """Start the child at once."""
        self.command = command
        self.restarts = 0
        self._restart_at: float | None = None
        self._launch()

    @property
    def pid(self) -> int:
        """Process id of the latest start."""
        return self._process.pid

    def status(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        return self._process.poll()

    def restart_if_due(self) -> None:
        """Start the child again if it is dead and its delay is over."""
        if self.status() is None:
            return
        now = time.monotonic()
        if self._restart_at is None:
            self._restart_at = now + self._delay_s(now)
        elif now >= self._restart_at:
            self.restarts += 1
            self._launch()

    def terminate(self) -> None:
        """Send the signal and don't wait."""
        if self.status() is None:
            self._process.terminate()

    def stop(self, at_once: threading.Event) -> None:
        """Ask the child to stop; kill it when its time is over or `at_once` is set."""
        self.terminate()
        ends_at = time.monotonic() + self.command.stop_s
        while self.status() is None and time.monotonic() < ends_at and not at_once.is_set():
            time.sleep(_TICK_S)
        if self.status() is None:
            log.warning("%s did not stop in time and is killed", self.command.name, extra={"action": "child_killed"})
            self._process.kill()
        self._process.wait()

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of its log."""
        return tail(self.command.log_path, lines) if self.command.log_path else ""

    def _launch(self) -> None:
        self._restart_at = None
        self._started_at = time.monotonic()
        self._process = launch(self.command)

    def _delay_s(self, now: float) -> float:
        lived_s = now - self._started_at
        if lived_s >= _STEADY_S:
            self.restarts = 0
        delay_s = min(_FIRST_DELAY_S * 2.0**self.restarts, _LONGEST_DELAY_S)
        log.warning(
            "%s ended with status %s after %.0f s; starting it again in %.1f s. Its log: %s",
            self.command.name,
            self.status(),
            lived_s,
            delay_s,
            self.command.log_path or "with ours",
            extra={"action": "child_died", "child": self.command.name},
        )
        return delay_s


class Children:
    """The children of one parent, in the order of their start. Start them from the main thread (see `launch`)."""

    def __init__(self) -> None:
        """Begin with none."""
        self._children: list[Child] = []

    def start(self, command: Command) -> Child:
        """Start a child and look after it from now on."""
        child = Child(command)
        self._children.append(child)
        return child

    def dead(self) -> Iterator[Child]:
        """Yield the children that are not running."""
        return (child for child in self._children if child.status() is not None)

    def keep_running(self, stop: threading.Event) -> Child | None:
        """Revive what dies until `stop` is set; return early with a child whose settings are bad."""
        while not stop.wait(_TICK_S):
            for child in self.dead():
                if child.status() == BAD_SETTINGS_STATUS:
                    return child
                child.restart_if_due()
        return None

    def stop(self, at_once: threading.Event, *, together: bool = False) -> None:
        """Stop one after the other, last started first: each leans on those before it. `at_once` set: kill instead.

        `together` asks all of them first: for children that don't need each other.
        """
        for child in self._children if together else ():
            child.terminate()
        while self._children:
            self._children.pop().stop(at_once)


def launch(command: Command) -> subprocess.Popen[bytes]:
    """Start a process that dies with us.

    The kernel sends the death signal when the thread that forked ends, so this must be called from the main thread.
    A group of its own keeps Ctrl-C away from the child: the parent stops its children in order.
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
    """Run this thread on some CPUs for a moment: a child starts where the thread that forked it may run."""
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
    """Return what a child does between fork and exec so that the kernel kills it with its parent.

    SIGKILL, because everything we start is made to be killed at any time, and a promise that a hung child can't break
    is worth more than a clean goodbye. Run after fork it may take no lock: it makes two system calls and returns.
    """
    libc = _libc
    if libc is None:
        return None

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the parent died before the call: no signal would ever come
            os._exit(1)

    return die_with_parent


@contextmanager
def stop_signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Turn SIGINT, SIGTERM and SIGHUP into two events: the first signal sets `stop`, another one sets `at_once`."""
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
    """Return the command that runs a module under this interpreter.

    -P keeps the current folder off `sys.path`: a user's own `worker.py` or `storage.py` there would hide our packages.
    """
    return (sys.executable, "-P", "-m", module, *arguments)


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a text file; nothing if there is none."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def rotate_logs(paths: Sequence[Path]) -> None:
    """Move logs of the run before aside, so that a log speaks of one run and old ones don't pile up."""
    for path in paths:
        if path.exists():
            path.replace(path.with_name(path.name + ".1"))
