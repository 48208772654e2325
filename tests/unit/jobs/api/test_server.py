from __future__ import annotations

import pytest
from fastapi import FastAPI

from jobs.api.server import server_config

# Seconds for which HTTP clients keep idle connections: their defaults in 2026.
CLIENTS_KEEP_S = {"httpx": 5, "node": 4, "aiohttp": 15, "java": 30, "nginx": 60, "go": 90}


@pytest.mark.parametrize(("client", "expires_after_s"), list(CLIENTS_KEEP_S.items()))
def test_the_server_keeps_idle_connections_longer_than_clients_do(client: str, expires_after_s: int) -> None:
    """Otherwise a client could send into a connection that is closing, and see it reset."""
    assert server_config(FastAPI()).timeout_keep_alive > expires_after_s, client
