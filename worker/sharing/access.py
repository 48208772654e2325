"""How a worker process uses its device: alone, or in turns with the processes of other models.

A process that shares its device asks the broker (`worker.sharing.broker`), which runs in its supervisor.
"""

from __future__ import annotations

import logging
import mmap
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from jobs.errors import SetupError
from worker.sharing.messages import (
    EndTurn,
    FreeMemory,
    JoinDevice,
    MayLoad,
    MeasureMemory,
    MemoryBudget,
    NeedMemory,
    Turn,
    WantTurn,
    WeightsLoaded,
    YieldTurn,
)

log = logging.getLogger(__name__)

_WAIT_S = 1.0  # between two looks for a turn that must come
_SECONDS = struct.Struct("d")


class DeviceAccess(Protocol):
    """What a process may do on its device, and when."""

    def admit(self, needed_bytes: Callable[[], int], free_bytes: Callable[[], int]) -> None:
        """Wait until the weights may be loaded; raise SetupError, with the numbers, if they do not fit."""

    def memory_budget(self, free_bytes: Callable[[], int]) -> int:
        """Return the bytes that may be used beside the weights, which are loaded."""

    def take_turn(self, timeout_s: float) -> bool:
        """Wait for a turn to run a step; return whether it has come."""

    def end_turn(self, *, more: bool) -> None:
        """Pass the device on if others wait, or without `more` to do."""

    def turn(self) -> AbstractContextManager[None]:
        """Have the device alone inside the block."""

    def energy_share(self) -> float:
        """Return the share of the energy since the last call that this process is charged with."""


class SoleAccess:
    """The device of a process that shares it with no other."""

    def admit(self, needed_bytes: Callable[[], int], free_bytes: Callable[[], int]) -> None:
        """Return at once: a model that is too large fails when it is loaded."""

    def memory_budget(self, free_bytes: Callable[[], int]) -> int:
        """Return all that is free."""
        return free_bytes()

    def take_turn(self, timeout_s: float) -> bool:
        """Return True."""
        return True

    def end_turn(self, *, more: bool) -> None:
        """Do nothing."""

    def turn(self) -> AbstractContextManager[None]:
        """Return a block."""
        return nullcontext()

    def energy_share(self) -> float:
        """Return 1."""
        return 1.0


class SharedAccess:
    """A device in turns with other processes. One thread uses it, except for `energy_share`."""

    def __init__(self, address: str, index: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Join the broker at `address` as the model with this index."""
        self._index = index
        self._clock = clock
        self._holds = self._wants = self._must_yield = False
        self._number = 0  # of the last wish for a turn
        self._began_s = 0.0
        self._connection = _connect(address)
        self._arrivals = select.poll()  # `Connection.poll` makes a selector for each call
        self._arrivals.register(self._connection.fileno(), select.POLLIN)
        self._send(JoinDevice(index))
        self._busy = BusyTimes(Path(address))
        self._seen = self._busy.read()

    def admit(self, needed_bytes: Callable[[], int], free_bytes: Callable[[], int]) -> None:
        """Wait until all models have said what they need; raise SetupError, with the numbers, if it is too much."""
        self._send(NeedMemory(needed_bytes(), free_bytes()))
        answer = self._receive(MayLoad)
        if answer.refusal:
            raise SetupError(answer.refusal)

    def memory_budget(self, free_bytes: Callable[[], int]) -> int:
        """Wait until the weights of all models are loaded; return an equal part of what they leave free."""
        free_bytes()  # it returns memory that torch holds for reuse, before any process measures
        self._send(WeightsLoaded())
        while isinstance(answer := self._receive(MeasureMemory, MemoryBudget), MeasureMemory):
            self._send(FreeMemory(free_bytes()))
        return int(answer.budget_bytes)

    def take_turn(self, timeout_s: float) -> bool:
        """Wait for a turn; return whether it has come. A turn that no other waits for lasts until one does."""
        if not self._holds and not self._wait_for_turn(timeout_s):
            return False
        self._began_s = self._clock()
        return True

    def end_turn(self, *, more: bool) -> None:
        """Pass the device on if others wait, or without `more` to do. Without a turn, withdraw the wish for one."""
        if not self._holds:
            if self._wants and not more:
                self._wants = False
                self._send(EndTurn(0.0, None))
            return
        used_s = self._clock() - self._began_s
        self._busy.add(self._index, used_s)
        self._began_s += used_s
        while self._has_message(0.0):
            self._must_yield |= isinstance(self._next(), YieldTurn)
        if self._must_yield or not more:
            self._number += more
            self._send(EndTurn(used_s, self._number if more else None))
            self._holds, self._wants = False, more

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the device alone inside the block."""
        while not self.take_turn(_WAIT_S):
            pass
        try:
            yield
        finally:
            self.end_turn(more=False)

    def energy_share(self) -> float:
        """Return this process's share of the device time since the last call; an equal one if all were idle."""
        before, self._seen = self._seen, self._busy.read()
        spent = [max(0.0, now - then) for now, then in zip(self._seen, before, strict=True)]
        return spent[self._index] / sum(spent) if any(spent) else 1 / len(spent)

    def close(self) -> None:
        """Leave the device to the others."""
        self._connection.close()

    def _wait_for_turn(self, timeout_s: float) -> bool:
        if not self._wants:
            self._wants = True
            self._number += 1
            self._send(WantTurn(self._number))
        ends_at = time.monotonic() + timeout_s
        while self._has_message(ends_at - time.monotonic()):
            given = self._next()  # an earlier turn, or a request to yield it, may have crossed its end
            if isinstance(given, Turn) and given.number == self._number:
                self._holds, self._wants, self._must_yield = True, False, given.contended
                return True
        return False

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError as error:
            raise _SupervisorGone from error

    def _has_message(self, timeout_s: float) -> bool:
        return bool(self._arrivals.poll(max(0.0, timeout_s) * 1e3))

    def _next(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise _SupervisorGone from error

    def _receive(self, *kinds: type[Any]) -> Any:
        """Return the next message of one of these kinds, and drop those before it."""
        if not self._has_message(_WAIT_S):
            log.info("Waiting for the other models of this device", extra={"action": "sharing"})
        while not isinstance(message := self._next(), kinds):
            pass
        return message


class _SupervisorGone(RuntimeError):
    """The supervisor, which deals out the turns of this device, has ended."""

    def __str__(self) -> str:
        return str(self.__doc__)


class BusyTimes:
    """Device time of each process in seconds, in a file that all of them map."""

    def __init__(self, address: Path, members: int = 0) -> None:
        """Open the file beside the broker's address; `members` > 0: create it."""
        path = address.with_name("busy")
        if members:
            path.write_bytes(bytes(members * _SECONDS.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def add(self, index: int, seconds: float) -> None:
        """Add to the time of a process, which is the only one that writes it."""
        at = index * _SECONDS.size
        _SECONDS.pack_into(self._map, at, _SECONDS.unpack_from(self._map, at)[0] + seconds)

    def read(self) -> list[float]:
        """Return the times of all processes."""
        return [seconds for (seconds,) in _SECONDS.iter_unpack(self._map[:])]


def _connect(address: str) -> Connection:
    with socket.socket(socket.AF_UNIX) as connecting:
        connecting.connect(address)
        return Connection(connecting.detach())
