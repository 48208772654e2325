"""Run every example as the README says, against a service started with `basic up`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.acceptance.conftest import Service
from tests.paths import EXAMPLES


def run(service: Service, *command: str, **environment: str) -> str:
    places = {"BASIC_API_URL": service.api_url, "BASIC_REDIS_URL": service.redis_url}
    full = service.environment | places | {"DATABASE": str(service.database), "PYTHON": sys.executable} | environment
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(program: str) -> None:
    """Skip if a program is not installed; fail in CI, where it must be."""
    if shutil.which(program) is None:
        assert not os.environ.get("CI"), f"{program} is missing"
        pytest.skip(f"{program} is not installed")


def test_our_client(service: Service) -> None:
    said = run(service, sys.executable, str(EXAMPLES / "our_client.py"))
    assert "rivers finished" in said
    assert "request-0" in said
    assert "failed: ['broken']" in said


def test_the_openai_client(service: Service) -> None:
    said = run(service, sys.executable, str(EXAMPLES / "openai_client.py"))
    assert "completed" in said
    assert {line.split(" ")[0] for line in said.splitlines()} >= {"capital", "rivers"}


def test_curl(service: Service) -> None:
    needs("curl")
    said = run(service, "sh", str(EXAMPLES / "curl.sh"))
    assert "event: tokens" in said
    assert '"status":"completed"' in said
    assert '"custom_id": "request-1"' in said


def test_redis_cli_and_a_producer(service: Service) -> None:
    needs("redis-cli")
    needs("sqlite3")
    said = run(service, "sh", str(EXAMPLES / "redis.sh"))
    assert '"type":"tokens"' in said
    assert "\nrivers|" in said
