"""Compile the C sources for this processor, and cache the libraries.

Without a C compiler the engine uses torch's operations, which are slower.
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

# Every operation rounds on its own: the result is that of torch's or NumPy's operations, and of the next compiler.
EXACT = ("-ffp-contract=off", "-fno-associative-math", "-fsigned-zeros")

_HEADERS = Path(__file__).parent  # folder of the headers that sources include


@cache
def library(source: Path, *options: str) -> ctypes.CDLL | None:
    """Return a source compiled with the compiler's `options`; log a warning and return None if that fails."""
    try:
        return ctypes.CDLL(str(_compiled(source, options)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.warning(
            "Decoding without compiled %s is slower: %s. Install gcc to compile them.",
            source.stem,
            reason,
            extra={"action": "no_kernels"},
        )
        return None


def _compiled(source: Path, options: tuple[str, ...]) -> Path:
    """Return the path of the library; compile it once per source, compiler and processor."""
    compiler = _compiler()
    identity = (
        *source_identity(source, options),
        compiler,
        platform.machine(),
        processor(),
        torch.__version__,
    )
    name = f"{source.stem}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    target = _folder() / name
    if not target.exists():
        # Write to a temporary file and rename it, so that processes that start together never load a partial library.
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as written:
            command = [
                compiler,
                *_FLAGS.split(),
                f"-I{_HEADERS}",
                *options,
                str(source),
                "-o",
                written.name,
                *_openmp(),
                "-lm",
            ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(written.name, target)
    return target


def source_identity(source: Path, options: tuple[str, ...]) -> tuple[str, ...]:
    """Return what decides on the machine code of a source for a given processor: its text, compiler and options."""
    texts = (file.read_text() for file in (source, *sorted({*_HEADERS.glob("*.h"), *source.parent.glob("*.h")})))
    return (*texts, _version(_compiler()), _FLAGS, *options)


def _compiler() -> str:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise FileNotFoundError("there is no C compiler")
    return compiler


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def _folder() -> Path:
    folder = Path(platformdirs.user_cache_dir("basic")) / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="basic-kernels-"))
    return folder


def processor() -> str:
    """Return the feature flags of this processor, or its name where /proc/cpuinfo is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _openmp() -> list[str]:
    """Link torch's own OpenMP runtime: a second one would start threads that compete for the cores."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]
