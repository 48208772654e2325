"""`make secrets && docker compose up --wait` without Docker: the file's commands run as processes, in its order.

Host names become loopback addresses, /run/secrets the folder that the script writes, and images programs from wheels.
Environments, commands, dependencies and health checks are those of the files.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from jobs.local.redis_server import server_binary
from tests.conftest import free_port
from tests.models import save_tiny
from tests.postgres import QUICK, Postgres

ROOT = Path(__file__).parents[2]
STARTED = ("redis", "postgres", "migrate", "api", "ingest", "worker")
READY_S = 240

# redis-cli of the image: only what the health check asks of it.
REDIS_CLI = """
import os, redis, sys
client = redis.Redis(port={port}, password=os.environ["REDISCLI_AUTH"])
print("PONG" if sys.argv[1:] == ["ping"] and client.ping() else sys.exit(1))
"""


def merged(ours: Any, over: Any) -> Any:
    """Merge two compose files, with the rules that ours use."""
    if not isinstance(ours, dict) or not isinstance(over, dict):
        return over
    return {**ours, **{name: merged(ours.get(name), value) for name, value in over.items()}}


def read(file: Path) -> Any:
    return json.loads(json.dumps(YAML(typ="rt").load(file.read_text().replace("!reset ", ""))))


class Compose:
    """The services of the compose files as processes of this machine."""

    def __init__(self, directory: Path, target: Path) -> None:
        self.directory = directory
        self.target = target
        self.services = merged(read(ROOT / "docker-compose.yml"), read(ROOT / "docs/compose-cpu.yml"))["services"]
        self.secrets = directory / "secrets"
        subprocess.run(["sh", str(ROOT / ".ci/make-secrets"), str(self.secrets)], check=True, capture_output=True)
        self.ports = {"redis": free_port(), "api": free_port()}
        self.postgres = Postgres(**QUICK)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._make_programs()

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['api']}"

    @property
    def key(self) -> str:
        return (self.secrets / "basic_api_key").read_text()

    def up(self) -> None:
        """Start all services, each when the conditions of its `depends_on` hold."""
        started: set[str] = set()
        while started != set(STARTED):
            for name in STARTED:
                needs = self.services[name].get("depends_on", {})
                if name in started or not needs.keys() <= started:
                    continue
                for other, wanted in needs.items():
                    self.wait_for(other, wanted["condition"])
                self.start(name)
                started.add(name)
        for name in STARTED:
            self.wait_for(name, "service_healthy" if "healthcheck" in self.services[name] else "service_started")

    def start(self, name: str) -> None:
        service = self.services[name]
        if name == "postgres":  # the image's entrypoint creates user and database; loopback needs no password
            self.postgres.start()
            self.postgres.create(service["environment"]["POSTGRES_DB"])
            self.ports["postgres"] = int(re.findall(r":(\d+)/", self.postgres.url())[0])
            return
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [self._here(word) for word in service["command"]],
                env=self.environment(name),
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, name: str, condition: str) -> None:
        ends_at = time.monotonic() + READY_S
        while not self._is(name, condition):
            assert time.monotonic() < ends_at, f"{name} is not {condition}:\n{self.log(name)}"
            time.sleep(0.3)

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of the container, and the paths of its secrets."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("BASIC_")}
        said = {key: self._here(value) for key, value in self.services[name].get("environment", {}).items()}
        secrets = [secret for secret in self.services[name].get("secrets", []) if secret.startswith("basic_")]
        told = {secret.upper(): self._here((self.secrets / secret).read_text()) for secret in secrets}
        ours = {"BASIC_DATA_DIR": str(self.directory / name), "BASIC_API_PORT": str(self.ports["api"])}
        ours |= {"PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        if "BASIC_TARGET" in said:
            said["BASIC_TARGET"] = str(self.target)
        return inherited | told | said | ours

    def log(self, name: str) -> str:
        file = self.directory / f"{name}.log"
        return file.read_text(errors="replace")[-3000:] if file.exists() else ""

    def down(self) -> None:
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.postgres.remove()

    def _is(self, name: str, condition: str) -> bool:
        process = self.processes.get(name)
        status = None if process is None else process.poll()
        if condition == "service_completed_successfully":
            assert status in (None, 0), f"{name} ended with status {status}:\n{self.log(name)}"
            return status == 0
        if name != "migrate":
            assert status is None, f"{name} ended with status {status}:\n{self.log(name)}"
        return condition == "service_started" or self._is_healthy(name)

    def _is_healthy(self, name: str) -> bool:
        how, *words = [self._here(word) for word in self.services[name]["healthcheck"]["test"]]
        command = words if how == "CMD" else ["sh", "-c", *words]
        done = subprocess.run(command, env=self.environment(name), cwd=self.directory, capture_output=True, check=False)
        return done.returncode == 0

    def _here(self, text: str) -> str:
        """Replace host names, ports and paths of containers by those of this machine."""
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text).replace("$$", "$")
        text = text.replace("/run/secrets", str(self.secrets)).replace(
            "127.0.0.1:8000", f"127.0.0.1:{self.ports['api']}"
        )
        text = text.replace("@redis:6379", f"@127.0.0.1:{self.ports['redis']}")
        return text.replace("@postgres:5432", f"@127.0.0.1:{self.ports.get('postgres')}")

    def _make_programs(self) -> None:
        folder = self.directory / "bin"
        folder.mkdir()
        (folder / "cli.py").write_text(REDIS_CLI.format(port=self.ports["redis"]))
        ready = self.postgres._binaries / "pg_isready"
        port = re.findall(r":(\d+)/", self.postgres.url())[0]
        for name, command in {
            "python": f"'{sys.executable}'",
            "basic": f"'{sys.executable}' -m jobs.cli",
            "redis-server": f"'{server_binary()}' --bind 127.0.0.1 --port {self.ports['redis']}",
            "redis-cli": f"'{sys.executable}' '{folder / 'cli.py'}'",
            "pg_isready": f"'{ready}' --host=127.0.0.1 --port={port}",
        }.items():
            (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    target = save_tiny(tmp_path_factory.mktemp("models") / "tiny")
    made = Compose(tmp_path_factory.mktemp("compose"), target)
    try:
        made.up()
        yield made
    finally:
        made.down()


def test_the_node_comes_up_and_serves_who_has_the_key_that_make_secrets_made(compose: Compose) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
    with httpx.Client(base_url=compose.api_url, timeout=240, trust_env=False) as http:
        assert http.post("/v1/completions", json=asked).status_code == 401
        answer = http.post("/v1/completions", json=asked, headers={"authorization": f"Bearer {compose.key}"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0


def test_a_second_start_migrates_nothing_and_keeps_the_key(compose: Compose) -> None:
    compose.start("migrate")
    compose.wait_for("migrate", "service_completed_successfully")
    assert "stored already" in compose.log("migrate")
