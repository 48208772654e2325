"""A service as a user starts it, shared by the acceptance tests."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.processes import ended

BASIC = Path(sys.executable).with_name("basic")
LEASE_S = 3.0
CONTEXT_TOKENS = 2_048


@dataclass(frozen=True)
class Service:
    api_url: str
    redis_url: str
    database: Path
    environment: dict[str, str]

    def basic(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(BASIC), *arguments]
        return subprocess.run(command, env=self.environment, input=stdin, capture_output=True, text=True, check=False)

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.database)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One `basic up` with SmolLM2 for all files that leave it running: loading the model takes most of their time."""
    data_dir = tmp_path_factory.mktemp("data")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
    changes = {
        "BASIC_API_PORT": "0",
        "BASIC_CACHE": "opt-in",  # most tests ask for the same again to see it decoded
        "BASIC_LEASE_S": str(LEASE_S),
        "BASIC_MAX_CONTEXT": str(CONTEXT_TOKENS),
        "BASIC_MODEL_ALIASES": "gpt-4o-mini=smollm2-135m-instruct",
    }
    environment = inherited | {"BASIC_DATA_DIR": str(data_dir)} | changes
    command = [str(BASIC), "up", "--detach", "--json"]
    up = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stderr
    said = json.loads(up.stdout)
    yield Service(said["api_url"], said["redis_url"], data_dir / "basic.sqlite3", environment)
    down = subprocess.run([str(BASIC), "down"], env=environment, capture_output=True, text=True, check=False)
    assert down.returncode == 0, down.stderr
    assert ended(said["pid"])


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.api_url}/v1", api_key="unused") as client:
        yield client
