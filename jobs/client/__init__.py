"""The Python client: submit jobs, follow them, fetch their results."""

from __future__ import annotations

from jobs.client.client import AsyncClient, AsyncJob, Client, Job

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job"]
