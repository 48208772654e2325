"""A user's modules named like our packages, in the folder from which the service is started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jobs.local.redis_server import is_ready
from jobs.local.service import down, start_detached
from jobs.processes import python_module
from jobs.settings import JobsSettings
from tests.models import save_tiny

HIDES = "raise ImportError('a module of the current folder was imported')"


@pytest.fixture(autouse=True)
def _folder_with_our_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder with modules named like ours and like a standard one; each raises when it is imported."""
    folder = tmp_path / "project"
    for name in ("worker.py", "storage.py", "migrations.py", "logging.py", "jobs/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(HIDES)
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("arguments", [("worker.health",), ("jobs.api", "--help"), ("worker.benchmark", "--help")])
def test_a_child_process_imports_our_packages_not_those_of_the_current_folder(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    environment = os.environ | {"BASIC_DATA_DIR": str(tmp_path / "data")}
    ended = subprocess.run(python_module(*arguments), env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == (1 if arguments == ("worker.health",) else 0), ended.stderr  # no worker serves here


def test_the_service_starts_in_a_folder_whose_modules_have_our_names(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "tiny")
    settings = JobsSettings(data_dir=tmp_path / "data", api_port=0, target=str(target))
    try:
        assert is_ready(start_detached(settings).redis_url)
    finally:
        assert down(settings.data_dir)
