"""Serving requests: claim, step, write."""

from __future__ import annotations
