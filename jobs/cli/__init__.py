"""The `basic` command."""

from __future__ import annotations

from jobs.cli.app import main

__all__ = ["main"]
