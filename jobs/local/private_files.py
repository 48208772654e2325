"""Files for their owner's eyes alone: prompts, texts, keys and passwords lie in the data directory.

Knows modes and names, nothing of what is in the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_OURS: Final = ("basic.sqlite3*", "local.key*", "logs", "redis", "up.*")  # what an embedded service makes there
_OTHERS: Final = 0o077
_FILE_MODE: Final = 0o600


def write_private(path: Path, text: str) -> None:
    """Write a file in one piece, readable to its owner alone from its first byte on."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "w") as file:
        file.write(text)
    part.replace(path)


def private(path: str, flags: int) -> int:
    """Open a file for `open(…, opener=private)`: one that is made can be read by its owner alone."""
    return os.open(path, flags, _FILE_MODE)


@contextmanager
def private_files() -> Iterator[int]:
    """Let this process, and what it starts, make files for their owner alone. Yield the umask from before."""
    before = os.umask(_OTHERS)
    try:
        yield before
    finally:
        os.umask(before)


def tighten(data_dir: Path) -> None:
    """Take the rights of others from what lies in a data directory, and from itself if nothing else lies there.

    A directory that holds other things too may be meant for others: it keeps its mode, and what is ours in it loses it.
    """
    ours = {path for pattern in _OURS for path in data_dir.glob(pattern)}
    for path in (path for path in ours if not path.is_symlink()):
        _tighten(path)
        for directory, directories, files in os.walk(path):
            for name in (*directories, *files):
                _tighten(Path(directory, name))
    if ours >= set(data_dir.iterdir()):
        _tighten(data_dir)


def _tighten(path: Path) -> None:
    with suppress(OSError):  # it is gone, or another user's: not ours to change
        mode = path.lstat().st_mode
        if mode & _OTHERS and not path.is_symlink():
            path.chmod(mode & 0o7777 & ~_OTHERS)
