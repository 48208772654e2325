"""Speculative decoding: draft trees, their budget and their costs."""

from __future__ import annotations
