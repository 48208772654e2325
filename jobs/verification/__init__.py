"""Verify outputs: compute a sample of a job again, compare, and sign what was found."""

from __future__ import annotations
