"""The compiler: C sources of ours as libraries for this processor, compiled once and kept.

Where there is no C compiler, torch's own operations do the same work, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import platformdirs
import torch

log = logging.getLogger(__name__)

_FLAGS = (
    "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -shared -fPIC"
)

_HEADERS = Path(__file__).parent  # that several sources include


@cache
def library(source: Path, *defines: str) -> ctypes.CDLL | None:
    """Return a source compiled with some `-D…`; None, with a warning, where that can't be done."""
    try:
        return ctypes.CDLL(str(_compiled(source, defines)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning(
            "Decoding goes on without compiled %s, slower: %s. Install gcc to have them.",
            source.stem,
            said,
            extra={"action": "no_kernels"},
        )
        return None


def _compiled(source: Path, defines: tuple[str, ...]) -> Path:
    """Return the library, compiled at most once per source, compiler and processor."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise FileNotFoundError("there is no C compiler")
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    identity = (
        *(file.read_text() for file in (source, *sorted(_HEADERS.glob("*.h")))),
        compiler,
        version,
        _FLAGS,
        *defines,
        platform.machine(),
        processor(),
        torch.__version__,
    )
    name = f"{source.stem}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    target = _folder() / name
    if not target.exists():
        # Into a file of our own, then renamed: processes that start together never load a half-written library.
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as written:
            command = [
                compiler,
                *_FLAGS.split(),
                f"-I{_HEADERS}",
                *defines,
                str(source),
                "-o",
                written.name,
                *_openmp(),
                "-lm",
            ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(written.name, target)
    return target


def _folder() -> Path:
    wanted = Path(platformdirs.user_cache_dir("basic")) / "kernels"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="basic-kernels-"))
    return wanted


def processor() -> str:
    """Return what this processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _openmp() -> list[str]:
    """Name torch's own OpenMP runtime to the linker: a second one would bring threads that fight for the cores."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]
