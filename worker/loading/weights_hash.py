"""The hash of a model's weight files. Files are read once: the hash of each is cached by its path, size and time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from worker.loading.model_store import OnMessage

_HUB_NAME = re.compile(r"[0-9a-f]{64}")  # the hub's cache names a large file by its SHA-256
_SLOW_BYTES = 1 << 30  # from here on the first hash takes seconds, and is announced
_THREADS = 4


def weights_hash(files: Sequence[Path], cache_dir: Path, on_message: OnMessage) -> str:
    """Return the SHA-256 of the names and contents of weight files, as hex; `cache_dir` keeps those of each file."""
    folder = cache_dir / "weights"
    unread = [file for file in files if _known(file, folder) is None]
    size = sum(file.stat().st_size for file in unread)
    if size >= _SLOW_BYTES:
        on_message(f"Hashing {size / 1e9:.1f} GB of weights, once")
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = list(threads.map(lambda file: _hash(file, folder), files))
    names = [(file.name, digest) for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()


def _hash(file: Path, folder: Path) -> str:
    known = _known(file, folder)
    if known is not None:
        return known
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    _keep(_entry(file, folder), digest)
    return digest


def _known(file: Path, folder: Path) -> str | None:
    """Return the hash of a file that needs no reading: by the hub's name for it, or from an earlier start."""
    stored = file.resolve().name
    if _HUB_NAME.fullmatch(stored):
        return stored
    try:
        digest = _entry(file, folder).read_text()
    except OSError:
        return None
    return digest if _HUB_NAME.fullmatch(digest) else None


def _entry(file: Path, folder: Path) -> Path:
    """Return where the hash of a file is kept: another size, time or inode is another file."""
    stat = file.resolve().stat()
    identity = (str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return folder / hashlib.sha256(repr(identity).encode()).hexdigest()[:32]


def _keep(entry: Path, digest: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = entry.with_suffix(f".{os.getpid()}")
        part.write_text(digest)
        part.replace(entry)
    except OSError:
        return  # a folder that can't be written: the next start reads the file again
