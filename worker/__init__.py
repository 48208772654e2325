"""The worker: engine, drafters, and the processes that serve jobs with them. The only package that imports torch."""

from __future__ import annotations

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
