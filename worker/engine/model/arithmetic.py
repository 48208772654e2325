"""The version of the engine's arithmetic: what of its own code fixes the bits of logits and draws.

Equal versions compute equal bits on one kind of device. Another version may or may not: a source that changed in a
comment only has another hash, which costs a comparison and never a wrong one.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

import torch

from worker.engine.cpu.compiler import source_identity
from worker.engine.cpu.kernels import kernels, source_options

# Raise it with a change of Python code that changes a bit: the order of a sum, a rounding, a draw.
VERSION: Final = 1

_FOLDER: Final = Path(__file__).parents[1]
_GPU_SOURCES: Final = ("gpu/*.py", "sampling/gpu_kernels.py")


@cache
def cpu_version(dtype: torch.dtype) -> str:
    """Return the version on a CPU: that of the compiled kernels, or "torch" where they do not run."""
    if kernels(dtype) is None:
        return f"{VERSION}-torch"
    draws = source_identity(_FOLDER / "sampling" / "native.c", ())
    return _version(source_identity(*source_options(dtype)), draws)


@cache
def gpu_version() -> str:
    """Return the version on a GPU: that of the Triton kernels and of their compiler."""
    import triton  # it comes with torch for CUDA

    sources = [path.read_text() for pattern in _GPU_SOURCES for path in sorted(_FOLDER.glob(pattern))]
    return f"{_version(triton.__version__, *sources)}-triton-{triton.__version__}"


def _version(*sources: object) -> str:
    return f"{VERSION}-{hashlib.sha256(repr(sources).encode()).hexdigest()[:12]}"
