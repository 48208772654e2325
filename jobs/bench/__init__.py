"""Benchmarks of the API server."""

from __future__ import annotations
