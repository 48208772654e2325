"""The request process of a worker: it runs the request loop, so that text and SQL take no time of the engine's thread.

    python -P -m worker.serving.request_process DESCRIPTOR PARENT

`RequestProcess` starts it as a child. It ends with its parent, at once and without renewing a lease. It ignores
signals: the parent tells it when to hand its requests back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from jobs.processes import parent_death_hook, python_module
from worker.serving.channel import SocketChannel, socket_pair

if TYPE_CHECKING:
    from worker.serving.messages import Setup

MODULE = "worker.serving.request_process"
_READY_POLL_S = 0.2
_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 30.0
_STEADY_S = 60.0  # a process that has run this long starts again without delay


class RequestProcess:
    """The request process of a worker, as its parent sees it."""

    def __init__(self) -> None:
        """Start it; it imports its modules and waits for `set_up`."""
        self.news = threading.Event()  # set when a message arrives, and when it ends
        self.failed_starts = 0  # in a row: it has ended without a message
        self._delay_s = 0.0
        self._launch()

    @property
    def dead(self) -> bool:
        """True when it has ended, or has closed its channel and is about to end."""
        return self.channel.closed

    def set_up(self, setup: Setup) -> None:
        """Let it serve: it claims once the engine reports."""
        self.channel.heard_at = time.monotonic()  # it has waited for this, maybe for long
        self.channel.send(setup)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait for its first message, which it sends when its tokenizer is loaded, or for its end."""
        ends_at = time.monotonic() + timeout_s
        while not (self.channel.heard or self.dead) and time.monotonic() < ends_at:
            self.channel.wait(_READY_POLL_S)

    def interrupt(self) -> None:
        """Kill it from another thread: its channel closes, and the thread that reads from it calls `kill`."""
        self._process.kill()

    def kill(self) -> int:
        """Kill it and return its exit status."""
        self._process.kill()
        status = self._process.wait()
        self.channel.close()
        return status

    def restart_delay_s(self) -> float:
        """Return how long to wait before `restart`: longer each time, unless it had run for a while."""
        self.failed_starts = 0 if self.channel.heard else self.failed_starts + 1
        steady = time.monotonic() - self._started_at > _STEADY_S
        self._delay_s = 0.0 if steady else min(max(_FIRST_DELAY_S, 2 * self._delay_s), _LONGEST_DELAY_S)
        return self._delay_s

    def restart(self) -> None:
        """Start another process in place of one that was killed."""
        self._launch()

    def hand_back(self, timeout_s: float) -> bool:
        """Let it commit and release its requests, and end; return whether it did so in time."""
        from worker.serving.messages import HandBack

        self.channel.send(HandBack(timeout_s))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s) == 0
        return False

    def _launch(self) -> None:
        near, far = socket_pair()
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(
            python_module(MODULE, str(far.fileno()), str(os.getpid())),
            stdin=subprocess.DEVNULL,
            pass_fds=[far.fileno()],
            process_group=0,  # Ctrl-C reaches the parent only, which hands the requests back
        )
        far.close()
        self.channel = SocketChannel(near, self.news)


def main(arguments: list[str]) -> int:
    """Serve the requests of the worker at the other end of a descriptor that this process has inherited."""
    descriptor, parent_pid = map(int, arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent = parent_death_hook(parent_pid)
    if die_with_parent is not None:
        die_with_parent()
    # Tokenizers need no torch: without it the process starts in 2 s and takes 130 MB instead of 350 MB.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it would log that there are no models
    from worker.serving.requests.request_service import serve  # the lines above must not wait for it

    return serve(SocketChannel(Connection(descriptor)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
