"""Serve requests: claim them, step the engine, commit the output."""

from __future__ import annotations
