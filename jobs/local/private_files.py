"""Keep the files of the data directory readable only by their owner: they hold prompts, outputs, keys and passwords."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_OWN_FILES: Final = (
    "basic.sqlite3*",
    "local.key*",
    "logs",
    "redis",
    "signing.key*",
    "up.*",
)  # created by embedded mode
_GROUP_AND_OTHERS: Final = 0o077
_FILE_MODE: Final = 0o600


def write_private(path: Path, text: str) -> None:
    """Write a file atomically. Only its owner can read it, from the first byte on."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    _write_new(part, text)
    part.replace(path)


def create_private(path: Path, text: str) -> None:
    """Write a new file atomically, as `write_private` does. Raises FileExistsError if it is there."""
    part = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        _write_new(part, text)
        os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _FILE_MODE), "w") as file:
        file.write(text)


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(…, opener=private_opener)`. A new file can be read only by its owner."""
    return os.open(path, flags, _FILE_MODE)


@contextmanager
def private_files() -> Iterator[int]:
    """Set the umask so that new files of this process and its children are private. Yield the previous umask."""
    before = os.umask(_GROUP_AND_OTHERS)
    try:
        yield before
    finally:
        os.umask(before)


def make_private(data_dir: Path) -> None:
    """Remove the access of group and others from the files of bASIC in a data directory.

    The directory itself becomes private only if it holds nothing else: a shared directory keeps its mode.
    """
    own = {path for pattern in _OWN_FILES for path in data_dir.glob(pattern)}
    for path in (path for path in own if not path.is_symlink()):
        _remove_access(path)
        for directory, directories, files in os.walk(path):
            for name in (*directories, *files):
                _remove_access(Path(directory, name))
    if own >= set(data_dir.iterdir()):
        _remove_access(data_dir)


def _remove_access(path: Path) -> None:
    with suppress(OSError):  # deleted meanwhile, or owned by another user
        mode = path.lstat().st_mode
        if mode & _GROUP_AND_OTHERS and not path.is_symlink():
            path.chmod(mode & 0o7777 & ~_GROUP_AND_OTHERS)
