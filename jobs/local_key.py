"""The key of embedded mode: whoever can read the data directory may do everything, and needs no key of their own.

local_start writes it, the shim and the client read it. So the `basic` commands of the person who runs `basic up` go on
working when keys for others are made.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

_FILE = "local.key"


def make_local_key(data_dir: Path) -> None:
    """Write the key, readable to nobody else, unless it is there."""
    path = data_dir / _FILE
    if read_local_key(data_dir):
        return
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"sk-basic-local-{secrets.token_hex(32)}")
    part.replace(path)


def read_local_key(data_dir: Path) -> str:
    """Return the key, or nothing where there is none or it can't be read."""
    try:
        return (data_dir / _FILE).read_text().strip()
    except OSError:
        return ""
