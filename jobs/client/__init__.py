"""The Python client: submit jobs, follow them, fetch their outputs. Needs httpx and pydantic, no server code."""

from __future__ import annotations

from jobs.client.async_client import AsyncClient, AsyncJob
from jobs.client.client import Client, Job
from jobs.client.request_body import DataFile
from jobs.tables.columns import Columns

__all__ = ["AsyncClient", "AsyncJob", "Client", "Columns", "DataFile", "Job"]
