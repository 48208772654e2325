"""The node: the only package that imports torch. Engine, drafters, and the Celery worker around them."""

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
