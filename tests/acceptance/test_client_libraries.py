"""Client libraries that ask for tools and structured output work unchanged; `make clients` installs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.conftest import Service

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv" / "clients" / "bin" / "python"
SCRIPT = Path(__file__).with_name("client_libraries.py")


@pytest.mark.skipif(not PYTHON.exists(), reason="the libraries need an environment of their own: make clients")
def test_client_libraries_get_the_objects_and_calls_that_they_ask_for(service: Service) -> None:
    command = [str(PYTHON), "-P", str(SCRIPT), service.api_url]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stderr
    _, *checks = map(json.loads, ran.stdout.splitlines())
    assert {check["check"]: check["error"] for check in checks if check["error"]} == {}
    assert len(checks) == 9
