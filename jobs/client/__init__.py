"""The Python client: submit jobs, follow them, fetch their results."""

from __future__ import annotations

from jobs.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]
