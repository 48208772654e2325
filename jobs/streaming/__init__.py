"""Partial output: pub/sub, the event hub and server-sent events."""

from __future__ import annotations
