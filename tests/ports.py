"""Free TCP ports on loopback."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from typing import Final

# Below the ports that Linux gives to outgoing connections: one of those would take the port before its server starts.
_PORTS: Final = range(15_000, 32_000)


def free_port() -> int:
    """Return a port on which no process listens; test processes that run at once draw from many."""
    dice = random.SystemRandom()
    while True:
        port = dice.choice(_PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
