"""The worker: engine, drafters, and the processes that serve jobs with them. The only package that imports torch."""

from __future__ import annotations

import os

# Read by OpenMP when torch is imported, which no module has done yet. Threads without work spin this often before they
# sleep, about 0.1 ms; OpenMP's own choice, some milliseconds, takes the processors from the other processes of a node.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from worker.seed import (
    generate_with_speculative_decoding,
    generate_with_standard_model,
    generate_with_streaming_speculative_decoding,
)

__all__ = [
    "generate_with_speculative_decoding",
    "generate_with_standard_model",
    "generate_with_streaming_speculative_decoding",
]
