"""Garbage collection in processes that serve."""

from __future__ import annotations

import gc


def exempt_loaded_objects() -> None:
    """Leave what has been loaded by now out of all later collections.

    A full one visits every object, and no thread runs meanwhile: the half million of libraries and a model take 0.1 s
    and more. They live as long as the process.
    """
    gc.collect()
    gc.freeze()
