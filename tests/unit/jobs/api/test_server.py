from __future__ import annotations

import pytest
from fastapi import FastAPI

from jobs.api.server import server_config

# Seconds for which clients keep a connection that rests: the defaults of their versions of 2026.
CLIENTS_KEEP_S = {"httpx": 5, "node": 4, "aiohttp": 15, "java": 30, "nginx": 60, "go": 90}


@pytest.mark.parametrize(("client", "expires_after_s"), list(CLIENTS_KEEP_S.items()))
def test_the_server_never_closes_a_connection_that_a_client_still_keeps(client: str, expires_after_s: int) -> None:
    """Else a client that polls at the server's own pace sends into a connection that closes, and sees it reset."""
    assert server_config(FastAPI()).timeout_keep_alive > expires_after_s, client
