"""Benchmarks of the worker: not part of the service."""

from __future__ import annotations
