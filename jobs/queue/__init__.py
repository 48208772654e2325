"""The Celery queue: its Redis transport, and notifications to workers."""

from __future__ import annotations
