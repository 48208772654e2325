"""The broker of a device: it deals turns and memory to the processes that share it. Its supervisor runs it in a thread.

A process that ends, however it ends, closes its connection: the broker takes its turn back, and the next process that
joins with its index starts again. Fairness is `FairQueue`'s, memory `MemorySplit`'s.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from jobs.errors import SetupError
from worker.sharing.access import BusyTimes
from worker.sharing.fair_queue import FairQueue
from worker.sharing.memory_split import MemorySplit
from worker.sharing.messages import EndTurn, FromBroker, JoinDevice, ToBroker, Turn, WantTurn, YieldTurn

log = logging.getLogger(__name__)

_TICK_S = 0.5  # longest time until `close` is noticed


class DeviceBroker:
    """Deals turns and memory of one device to the processes of several models."""

    def __init__(self, names: Sequence[str]) -> None:
        """Listen at `address` for the processes of the models with these names."""
        self._folder = TemporaryDirectory(prefix="basic-device-")  # only its owner may open it
        self.address = str(Path(self._folder.name) / "broker")
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(self.address)
        except OSError as error:
            raise SetupError(f"can't listen at {self.address}: {error}; set TMPDIR to a short path") from error
        self._listener.listen()
        self._busy = BusyTimes(Path(self.address), len(names))
        self._queue = FairQueue(len(names))
        self._memory = MemorySplit(tuple(names))
        self._connections: dict[Connection, int | None] = {}  # with the index of the model, once it has joined
        self._numbers = [0] * len(names)  # of the wish of each model
        self._asked = False  # the holder knows that others wait
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="basic-broker", daemon=True)

    def __enter__(self) -> DeviceBroker:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        """Stop the thread and close all connections."""
        self._stop.set()
        with suppress(OSError):  # not Linux
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def _serve(self) -> None:
        while not self._stop.is_set():
            arrived = wait([self._listener, *self._connections], _TICK_S)
            for ready in arrived if not self._stop.is_set() else ():
                if ready is self._listener:
                    self._connections[Connection(self._listener.accept()[0].detach())] = None
                elif isinstance(ready, Connection) and ready in self._connections:
                    self._hear(ready)
            self._deal()

    def _hear(self, connection: Connection) -> None:
        try:
            self._take(connection, connection.recv())
        except (EOFError, OSError):
            self._forget(connection)

    def _take(self, connection: Connection, message: ToBroker) -> None:
        if isinstance(message, JoinDevice):
            for earlier in [known for known, index in self._connections.items() if index == message.index]:
                self._forget(earlier)
            self._connections[connection] = message.index
            return
        index = self._connections[connection]
        if index is None:
            return
        match message:
            case WantTurn():
                self._numbers[index] = message.number
                self._queue.want(index)
            case EndTurn():
                self._numbers[index] = message.next_number or 0
                self._queue.end_turn(index, message.used_s, more=message.next_number is not None)
            case _:
                for addressee, answer in self._memory.take(index, message):
                    self._send(addressee, answer)

    def _deal(self) -> None:
        """Give a free device away, and tell its holder that others wait."""
        while (member := self._queue.grant()) is not None:
            self._asked = self._queue.contended
            self._send(member, Turn(self._numbers[member], self._asked))
        if self._queue.contended and not self._asked:
            assert self._queue.holder is not None
            self._asked = True
            self._send(self._queue.holder, YieldTurn())

    def _send(self, index: int, message: FromBroker) -> None:
        for connection in [known for known, joined in self._connections.items() if joined == index]:
            try:
                connection.send(message)
            except OSError:
                self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        index = self._connections.pop(connection)
        connection.close()
        if index is not None:
            self._queue.leave(index)
            self._memory.forget(index)
