"""Requests of a worker, in a process of their own: claims, prompts, text, rows and events."""

from __future__ import annotations
