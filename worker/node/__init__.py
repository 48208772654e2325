"""Processes of a node: supervisor, placement and ranks."""

from __future__ import annotations
