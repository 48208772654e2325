"""The built wheel in a new environment: it breaks no other distribution, and none breaks it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.paths import ROOT

OTHER = "raise RuntimeError('the file of another project was imported')\n"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built from a copy, because a checkout may hold files of an earlier build."""
    copy = tmp_path_factory.mktemp("checkout")
    for package in ("basic_batch", "jobs", "storage", "worker", "migrations"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return built(copy)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a project that has a top-level package `migrations`, too."""
    project = tmp_path_factory.mktemp("other")
    (project / "migrations").mkdir()
    for name in ("env.py", "script.py.mako"):
        (project / "migrations" / name).write_text(OTHER)
    (project / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['setuptools']\nbuild-backend = 'setuptools.build_meta'\n"
        "[project]\nname = 'other'\nversion = '1'\n[tool.setuptools]\npackages = ['migrations']\n"
    )
    return built(project)


def built(project: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(project / "dist")]
    subprocess.run([*PIP, "wheel", *options, str(project)], check=True, env=bare_environment())
    (found,) = (project / "dist").glob("*.whl")
    return found


def environment_with(folder: Path, *wheels: Path) -> Path:
    """Return the Python of a new environment with these wheels; their dependencies come from this environment."""
    venv.create(folder)
    python = folder / "bin" / "python"
    for one in wheels:
        install = [*PIP, "--python", str(python), "install", "--no-deps", str(one)]
        subprocess.run(install, check=True, env=bare_environment())
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(purelib, "needs.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def bare_environment() -> dict[str, str]:
    """Return the environment variables without BASIC_* settings and without Python paths to a checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("BASIC_", "PYTHON"))}


def run(python: Path, *command: str, at: Path) -> str:
    """Run a command in a folder and return its output."""
    environment = bare_environment() | {"BASIC_DATA_DIR": str(at / "data")}
    done = subprocess.run(
        [str(python.parent / command[0]), *command[1:]], cwd=at, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ours_first", [True, False])
def test_migrations_are_found_where_another_distribution_has_a_package_of_that_name(
    wheel: Path, other: Path, tmp_path: Path, ours_first: bool
) -> None:
    wheels = (wheel, other) if ours_first else (other, wheel)
    python = environment_with(tmp_path / "environment", *wheels)
    run(python, "basic", "db", "upgrade", at=tmp_path)
    assert (tmp_path / "data" / "basic.sqlite3").exists()
    theirs = run(python, "python", "-c", "import migrations; print(*migrations.__path__)", at=tmp_path).split()[0]
    assert Path(theirs, "env.py").read_text() == OTHER, "and the other project keeps its files"


def test_all_import_names_are_there_and_one_that_no_project_shares(wheel: Path, tmp_path: Path) -> None:
    python = environment_with(tmp_path / "environment", wheel)
    script = (
        "import jobs, storage, worker, migrations.versions, basic_batch as b;"
        "from basic_batch import AsyncClient, Client, errors, push;"
        "assert Client is jobs.Client and push.__module__ == 'jobs.producer'; print(b.__version__, migrations.__file__)"
    )
    version, file = run(python, "python", "-c", script, at=tmp_path).split()
    assert version in wheel.name
    assert file.startswith(str(tmp_path)), "the wheel's, not the checkout's"


def test_files_of_our_names_in_the_current_folder_break_no_command(wheel: Path, tmp_path: Path) -> None:
    python = environment_with(tmp_path / "environment", wheel)
    folder = tmp_path / "project"
    (folder / "jobs").mkdir(parents=True)
    for name in ("worker.py", "storage.py", "migrations.py", "jobs/__init__.py"):
        (folder / name).write_text(OTHER)
    run(python, "basic", "db", "upgrade", at=folder)
    run(python, "basic", "keys", "create", "alice", at=folder)
    assert "alice" in run(python, "basic", "keys", "list", at=folder)
