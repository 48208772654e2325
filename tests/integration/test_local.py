from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from sqlalchemy import make_url

from jobs.errors import SetupError
from jobs.local.redis_server import is_ready, server_arguments, server_binary
from jobs.local.service import LocalService, down, running_service, start_detached
from jobs.settings import JobsSettings, environment
from tests.conftest import free_port
from tests.processes import children_of, ended

AWKWARD = "d a%41t?a #'é[x]*\"\\y"  # characters with a meaning in URLs, SQL, shells or globs

# A parent that starts a Redis-protocol server as its child, prints its process id and waits to be killed.
PARENT = """
import os, signal, sys
from pathlib import Path
from jobs.processes import Children, Command
child = Children().start(Command("redis", tuple(sys.argv[2:]), dict(os.environ), Path(sys.argv[1])))
print(child.pid, flush=True)
signal.pause()
"""


def start_parent(port: int, directory: Path) -> tuple[subprocess.Popen[str], int]:
    """Start the parent above and return it with the process id of its server, once that answers."""
    arguments = server_arguments(server_binary(), port, directory)
    command = [sys.executable, "-c", PARENT, str(directory / "redis.log"), *arguments]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        server = int(parent.stdout.readline())
    with redis.Redis(port=port, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 100)) as client:
        assert client.ping()
    return parent, server


def test_a_killed_parent_takes_its_server_along_and_no_write_is_lost(tmp_path: Path) -> None:
    port = free_port()
    parent, server = start_parent(port, tmp_path)
    with redis.Redis(port=port) as client:
        client.rpush("basic:test", *range(1000))
    parent.kill()
    parent.wait()
    assert ended(server)
    assert not is_ready(f"redis://127.0.0.1:{port}/0")

    parent, server = start_parent(port, tmp_path)
    with redis.Redis(port=port, decode_responses=True) as client:
        assert client.llen("basic:test") == 1000
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}
    parent.kill()
    parent.wait()
    assert ended(server)


@pytest.fixture
def settings(tmp_path: Path, tiny_target: Path) -> JobsSettings:
    return JobsSettings(data_dir=tmp_path / AWKWARD, api_port=0, target=str(tiny_target))


def test_a_crash_leaves_nothing_running_and_the_next_start_recovers(settings: JobsSettings) -> None:
    crashed = start_detached(settings)
    processes = children_of(crashed.pid)
    assert len(processes) == 4
    assert running_service(settings.data_dir) == crashed
    os.kill(crashed.pid, signal.SIGKILL)
    assert all(ended(pid) for pid in [crashed.pid, *processes])
    assert running_service(settings.data_dir) is None

    service = start_detached(settings)
    try:
        assert start_detached(settings) == service
        processes = children_of(service.pid)
        assert is_ready(service.redis_url)
    finally:
        assert down(settings.data_dir)
    assert all(ended(pid) for pid in [service.pid, *processes])
    assert running_service(settings.data_dir) is None
    assert not down(settings.data_dir)


def test_no_other_user_of_the_machine_can_read_the_data_or_ask_redis(settings: JobsSettings) -> None:
    logs = settings.data_dir / "logs"
    logs.mkdir(parents=True, mode=0o755)
    (logs / "worker.log").write_text("of a run before\n")
    before = os.umask(0o022)
    service = start_detached(settings)
    try:
        data = [settings.data_dir, *settings.data_dir.rglob("*")]
        made = {"basic.sqlite3", "worker.log", "worker.log.1", "appendonlydir", "up.json"}
        assert {path.name for path in data} >= made
        assert [path for path in data if path.stat().st_mode & 0o077] == []
        url = make_url(service.redis_url)
        with redis.Redis(port=url.port or 0) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        password = str(url.password)
        assert len(password) == 64
        arguments = [Path(f"/proc/{pid}/cmdline").read_text() for pid in [service.pid, *children_of(service.pid)]]
        assert [said for said in arguments if password in said] == []
    finally:
        os.umask(before)
        down(settings.data_dir)


def test_ctrl_c_in_the_foreground_ends_all_with_status_0(settings: JobsSettings) -> None:
    command = [sys.executable, "-m", "jobs.cli", "up", "--json"]
    with subprocess.Popen(command, env=environment(settings), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        service = json.loads(process.stdout.readline())
        assert service["pid"] == process.pid
        assert service["data_dir"] == str(settings.data_dir)
        processes = children_of(process.pid)
        assert len(processes) == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 0
    assert all(ended(pid) for pid in processes)


def test_a_model_that_cannot_be_loaded_stops_the_start_with_the_reason(settings: JobsSettings, tmp_path: Path) -> None:
    (tmp_path / "empty-model").mkdir()
    bad = settings.model_copy(update={"target": str(tmp_path / "empty-model")})
    with pytest.raises(SetupError, match=r"(?s)worker can't start.*empty-model"):
        start_detached(bad)
    assert running_service(settings.data_dir) is None
    assert not down(settings.data_dir)


def test_a_model_directory_that_is_not_there_stops_the_start(settings: JobsSettings) -> None:
    with pytest.raises(SetupError, match=r"no model directory /no/such/model"):
        start_detached(settings.model_copy(update={"target": "/no/such/model"}))


def test_a_redis_server_that_was_named_must_answer(settings: JobsSettings) -> None:
    with pytest.raises(SetupError, match="BASIC_REDIS_URL"):
        start_detached(settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"}))


def test_the_service_uses_a_redis_server_that_was_named(settings: JobsSettings, redis_url: str) -> None:
    service: LocalService = start_detached(settings.model_copy(update={"redis_url": redis_url}))
    try:
        assert service.redis_url == redis_url
        assert len(children_of(service.pid)) == 3
    finally:
        down(settings.data_dir)
    assert is_ready(redis_url)


@pytest.mark.parametrize("draft", ["suffix", "none"])
def test_a_service_without_a_draft_model_starts(
    draft: str, settings: JobsSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASIC_DRAFT", draft)
    try:
        assert is_ready(start_detached(settings).redis_url)
    finally:
        assert down(settings.data_dir)
