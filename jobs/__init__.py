"""The contract of bASIC and its faces: messages, intake, queue, REST shim, client, command line. No torch."""

from __future__ import annotations

from jobs.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
