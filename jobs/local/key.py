"""The local key: an admin key in a file of the data directory, for `basic` commands of the user who runs `basic up`.

These commands keep working without BASIC_API_KEY after keys for others are created. Startup writes the file; the API
server and the client read it.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from jobs.local.private_files import write_private

_FILE = "local.key"


def make_local_key(data_dir: Path) -> None:
    """Create the key, readable only by this user, if there is none yet."""
    if not read_local_key(data_dir):
        write_private(data_dir / _FILE, f"sk-basic-local-{secrets.token_hex(32)}")


def read_local_key(data_dir: Path) -> str:
    """Return the key; an empty string if there is none or it can't be read."""
    try:
        return (data_dir / _FILE).read_text().strip()
    except OSError:
        return ""
