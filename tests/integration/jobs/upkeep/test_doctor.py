"""What the doctor finds on a real Redis-protocol server."""

from __future__ import annotations

import redis

from jobs.settings import JobsSettings
from tests.unit.jobs.upkeep.test_doctor import found, installed

__all__ = ["installed"]  # a fixture


def test_a_server_that_evicts_is_a_problem(installed: JobsSettings, redis_url: str) -> None:
    settings = installed.model_copy(update={"redis_url": redis_url})
    assert found(settings)["redis memory"].status == "ok"
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            assert "allkeys-lru" in found(settings)["redis memory"].message
        finally:
            client.config_set("maxmemory-policy", "noeviction")
