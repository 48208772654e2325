"""Embedded mode: queue, database, worker and API server on this machine."""

from __future__ import annotations
