"""Paged KV: rows, attention, shape buckets and CUDA graphs."""

from __future__ import annotations
