"""Client libraries that ask for tools and structured output work unchanged; `make clients` installs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.conftest import Service

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "environment", "count"),
    [("client_libraries", "clients", 9), ("response_libraries", "clients-responses", 5)],
)
def test_client_libraries_get_the_objects_and_calls_that_they_ask_for(
    service: Service, script: str, environment: str, count: int
) -> None:
    python = ROOT / ".venv" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip("the libraries need environments of their own: make clients")
    command = [str(python), "-m", f"tests.acceptance.{script}", service.api_url]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stderr
    _, *checks = map(json.loads, ran.stdout.splitlines())
    assert {check["check"]: check["error"] for check in checks if check["error"]} == {}
    assert len(checks) == count
