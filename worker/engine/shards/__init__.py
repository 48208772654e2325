"""Shards of a split model: the parts of its sums, and how ranks exchange them."""

from __future__ import annotations
