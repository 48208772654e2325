from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import processes
from jobs.errors import ChildRefused, SetupError
from jobs.local import startup
from jobs.local.private_files import make_private
from jobs.local.redis_server import server_arguments
from jobs.local.service import down, running_service, up
from jobs.local.startup import Startup
from jobs.local.state import LocalService, data_dir_lock, lock_owner, write_service
from jobs.processes import Child, Children, Command, rotate_logs, stop_signals, tail
from jobs.settings import JobsSettings, environment
from tests.processes import ended

NEVER = threading.Event()


def a_service(data_dir: Path, pid: int | None = None) -> LocalService:
    return LocalService(
        api_url="http://127.0.0.1:8000",
        redis_url="redis://127.0.0.1:6379/0",
        database_url="sqlite:///x",
        data_dir=str(data_dir),
        pid=os.getpid() if pid is None else pid,
    )


def a_shell(script: str, directory: Path, stop_s: float = 10.0) -> Command:
    return Command("shell", ("/bin/sh", "-c", script), dict(os.environ), directory / "shell.log", stop_s)


def test_a_second_service_on_a_data_directory_is_refused_with_the_owner(tmp_path: Path) -> None:
    with data_dir_lock(tmp_path):
        assert lock_owner(tmp_path) == os.getpid()
        with pytest.raises(SetupError, match=f"process {os.getpid()}.*basic down"), data_dir_lock(tmp_path):
            pytest.fail("two owners")
    assert lock_owner(tmp_path) is None


def test_up_json_of_a_crashed_service_is_ignored(tmp_path: Path) -> None:
    write_service(a_service(tmp_path))
    assert running_service(tmp_path) is None
    assert not down(tmp_path)
    with data_dir_lock(tmp_path):
        assert running_service(tmp_path) is None


def test_up_json_of_another_process_is_ignored(tmp_path: Path) -> None:
    with data_dir_lock(tmp_path):
        write_service(a_service(tmp_path, pid=1))
        assert running_service(tmp_path) is None


def test_a_service_is_found_from_its_announcement_to_its_end(tmp_path: Path) -> None:
    service = a_service(tmp_path)
    with data_dir_lock(tmp_path):
        assert running_service(tmp_path) is None
        write_service(service)
        assert running_service(tmp_path) == service
        assert json.loads((tmp_path / "up.json").read_text()) == asdict(service)
    assert running_service(tmp_path) is None
    assert not (tmp_path / "up.json").exists()


def test_an_absent_data_directory_has_no_running_service(tmp_path: Path) -> None:
    assert running_service(tmp_path / "absent") is None
    assert not down(tmp_path / "absent")


def test_a_dead_child_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_FIRST_DELAY_S", 0.0)
    child = Child(a_shell("echo started; exit 3", tmp_path))
    first = child.pid
    assert ended(first)
    assert child.status() == 3
    child.restart_if_due()
    child.restart_if_due()
    assert child.pid != first
    assert ended(child.pid)
    assert child.log_tail() == "started\nstarted"
    child.stop(NEVER)


def test_a_child_that_keeps_dying_waits_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("jobs.processes.time.monotonic", lambda: now)
    child = Child(a_shell("exit 3", tmp_path))
    waits: list[float] = []
    for _ in range(8):
        assert ended(child.pid)
        child.restart_if_due()
        wait_s, restarts = 0.0, child.restarts
        while child.restarts == restarts:
            wait_s += 0.5
            now += 0.5
            child.restart_if_due()
        waits.append(wait_s)
    child.stop(NEVER)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_child_whose_settings_are_bad_is_not_started_again(tmp_path: Path) -> None:
    children = Children()
    child = children.start(a_shell("echo no such model; exit 78", tmp_path))
    assert ended(child.pid)
    assert children.keep_running(NEVER) is child
    assert child.log_tail() == "no such model"


def test_children_stop_in_the_reverse_order_of_their_start(tmp_path: Path) -> None:
    children = Children()
    order = tmp_path / "order"
    for name in ("first", "second"):
        script = f"trap 'echo {name} >> {order}; exit 0' TERM; touch {tmp_path / name}; while :; do sleep 0.02; done"
        children.start(a_shell(script, tmp_path))
        _await_file(tmp_path / name)
    children.stop(NEVER)
    assert order.read_text().split() == ["second", "first"]


def test_a_child_is_told_to_stop_once(tmp_path: Path) -> None:
    told, go = tmp_path / "told", tmp_path / "go"
    script = f"n=0; trap 'n=$((n+1)); touch {told}' TERM; touch {tmp_path / 'ready'}; "
    child = Child(a_shell(f"{script} while [ ! -e {go} ]; do sleep 0.02; done; exit $n", tmp_path))
    _await_file(tmp_path / "ready")
    child.terminate()
    _await_file(told)
    child.terminate()
    go.touch()
    child.stop(NEVER)
    assert child.status() == 1, "a second signal ends a worker before it has released its requests"


@pytest.mark.parametrize("at_once", [False, True])
def test_a_child_that_does_not_stop_is_killed(tmp_path: Path, at_once: bool) -> None:
    stop_s = 60.0 if at_once else 0.2
    script = f"trap '' TERM; touch {tmp_path / 'ready'}; while :; do sleep 0.02; done"
    child = Child(a_shell(script, tmp_path, stop_s))
    _await_file(tmp_path / "ready")
    hurry = threading.Event()
    if at_once:
        hurry.set()
    child.stop(hurry)
    assert child.status() == -signal.SIGKILL


def test_the_first_signal_stops_gracefully_and_the_second_at_once() -> None:
    with stop_signals() as (stop, at_once):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert not at_once.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert at_once.wait(5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_new_log_file_per_run_keeps_the_previous_one(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    for run in ("first", "second", "third"):
        rotate_logs([log])
        log.write_text(f"{run}\n")
    assert tail(log, 5) == "third"
    assert tail(tmp_path / "worker.log.1", 5) == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["worker.log", "worker.log.1"]


def test_children_inherit_given_settings_but_no_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASIC_TARGET", "from-the-environment")
    settings = JobsSettings(data_dir=tmp_path, target="given").model_copy(update={"api_port": 8123})
    told = environment(settings)
    assert told["BASIC_TARGET"] == "given"
    assert told["BASIC_DATA_DIR"] == str(tmp_path)
    assert told["BASIC_API_PORT"] == "8123"
    assert "BASIC_REDIS_URL" not in told


def test_an_occupied_port_that_was_set_stops_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=f"port {port} .* is taken"):
            startup._with_api_address(JobsSettings(data_dir=tmp_path, api_port=port))


def test_an_occupied_default_port_is_replaced_by_a_free_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        usual = JobsSettings(data_dir=tmp_path).model_copy()
        object.__setattr__(usual, "api_port", port)
        settled = startup._with_api_address(usual)
    assert settled.api_port != port
    assert settled.api_url == f"http://127.0.0.1:{settled.api_port}"


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:{}"), ("127.0.0.1", "http://127.0.0.1:{}"), ("::1", "http://[::1]:{}")],
)
def test_the_announced_url_can_be_reached(tmp_path: Path, host: str, url: str) -> None:
    settled = startup._with_api_address(JobsSettings(data_dir=tmp_path, api_host=host, api_port=0))
    assert settled.api_url == url.format(settled.api_port)


def test_a_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SetupError, match=r"file/data.*BASIC_DATA_DIR"):
        up(JobsSettings(data_dir=tmp_path / "file" / "data"), announce=lambda _: None)


def test_files_of_the_data_directory_become_private(tmp_path: Path) -> None:
    ours = [tmp_path / name for name in ("basic.sqlite3", "basic.sqlite3-wal", "redis/aof/a.aof", "logs/up.log.1")]
    for file in ours:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        file.write_text("private")
        file.chmod(0o664)
    tmp_path.chmod(0o755)
    make_private(tmp_path)
    assert {file.stat().st_mode & 0o777 for file in ours} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()} == {0o700}


def test_a_data_directory_with_other_files_keeps_its_mode(tmp_path: Path) -> None:
    for name in ("basic.sqlite3", "photo.png"):
        (tmp_path / name).touch(0o644)
    (tmp_path / "logs").symlink_to(tmp_path.parent)
    modes = {path: path.stat().st_mode for path in (tmp_path / "photo.png", tmp_path.parent)}
    tmp_path.chmod(0o755)
    make_private(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert {path: path.stat().st_mode for path in modes} == modes
    assert (tmp_path / "basic.sqlite3").stat().st_mode & 0o077 == 0


def test_a_password_is_in_no_argument_and_in_no_readable_file(tmp_path: Path) -> None:
    arguments = server_arguments(Path("valkey-server"), 1, tmp_path, "secret")
    assert "secret" not in " ".join(arguments)
    (users,) = tmp_path.iterdir()
    assert users.stat().st_mode & 0o077 == 0
    assert str(users) in arguments


def test_a_tilde_that_no_shell_expanded_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BASIC_DATA_DIR", "~/data")
    assert JobsSettings().data_dir == tmp_path / "data"


def test_a_data_directory_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="not UTF-8"):
        up(JobsSettings(data_dir=tmp_path / os.fsdecode(b"\xff")), announce=lambda _: None)


def test_a_child_that_dies_during_the_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    children = Children()
    child = children.start(a_shell("echo the model directory is empty; exit 1", tmp_path))
    start = Startup(JobsSettings(data_dir=tmp_path), children, threading.Event())
    with pytest.raises(SetupError, match=r"(?s)status 1.*the model directory is empty.*shell\.log"):
        start._await(child, lambda: False, "the worker", None)


def _await_file(path: Path) -> None:
    ends_at = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < ends_at, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize(("status", "kind"), [(78, ChildRefused), (1, SetupError), (-9, SetupError)])
def test_a_child_with_bad_settings_is_reported_differently_from_a_crash(status: int, kind: type[SetupError]) -> None:
    command = SimpleNamespace(name="worker", log_path="worker.log")
    child = SimpleNamespace(command=command, status=lambda: status, log_tail=lambda: "Loading x\nx is damaged")
    error = startup._child_died(child)  # type: ignore[arg-type]
    assert type(error) is kind
    assert "x is damaged\nFull log: worker.log" in str(error)
