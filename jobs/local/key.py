"""The key of embedded mode: whoever can read the data directory may do everything, and needs no key of their own.

local_start writes it, the shim and the client read it. So the `basic` commands of the person who runs `basic up` go on
working when keys for others are made.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from jobs.local.private_files import write_private

_FILE = "local.key"


def make_local_key(data_dir: Path) -> None:
    """Write the key, readable to nobody else, unless it is there."""
    if not read_local_key(data_dir):
        write_private(data_dir / _FILE, f"sk-basic-local-{secrets.token_hex(32)}")


def read_local_key(data_dir: Path) -> str:
    """Return the key, or nothing where there is none or it can't be read."""
    try:
        return (data_dir / _FILE).read_text().strip()
    except OSError:
        return ""
