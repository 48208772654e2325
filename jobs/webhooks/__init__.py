"""Webhooks: which addresses may be called, signed requests to them, and the sender of the outbox."""

from __future__ import annotations
