"""bASIC without storage and workers: messages, submission, queue, API server, client, command line. No torch."""

from __future__ import annotations

from jobs.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
