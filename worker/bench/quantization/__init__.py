"""Quantised weights and KV beside those of the checkpoint: `python -m worker.bench.quantization`."""

from __future__ import annotations
