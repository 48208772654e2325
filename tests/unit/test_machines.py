"""deploy/systemd and deploy/proxy: systemd and the proxies read the files, which agree with commands and settings."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs.api.server import _KEEP_ALIVE_S
from jobs.processes import BAD_SETTINGS_STATUS
from jobs.settings import JobsSettings, settings_classes
from tests.commands import parse
from tests.paths import ROOT

UNITS = sorted((ROOT / "deploy/systemd").glob("basic*.*e*"))
SERVICES = [unit for unit in UNITS if unit.suffix == ".service"]
NGINX = (ROOT / "deploy/proxy/nginx.conf").read_text()
CADDY = (ROOT / "deploy/proxy/Caddyfile").read_text()
INSTALLED = "/opt/basic/bin/"
MEGABYTE = {"m": 2**20, "MB": 10**6}
LIMITS = JobsSettings()


def service(unit: Path) -> configparser.SectionProxy:
    read = configparser.ConfigParser(interpolation=None)
    read.optionxform = str  # type: ignore[method-assign,assignment]
    read.read(unit)
    return read["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_units_without_a_complaint(tmp_path: Path) -> None:
    units = [unit for unit in UNITS if unit.suffix in (".service", ".target")]
    for unit in units:
        # Programs that exist on this machine.
        (tmp_path / unit.name).write_text(re.sub(rf"{INSTALLED}\w+", sys.executable, unit.read_text()))
    command = ["systemd-analyze", "verify", *(str(tmp_path / unit.name) for unit in units)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "basic" in line]
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_a_unit_runs_a_command_of_ours_and_restarts_it_unless_settings_are_wrong(unit: Path) -> None:
    said = service(unit)
    for line in (said["ExecStartPre"], said["ExecStart"]):
        program, *arguments = line.removeprefix(INSTALLED).split()
        if program == "python":
            assert find_spec(arguments[1]) is not None
        else:
            assert program == "basic"
            parse(arguments)
    assert said["Restart"] == "always"
    assert int(said["RestartPreventExitStatus"]) == BAD_SETTINGS_STATUS
    assert int(said["TimeoutStopSec"]) > settings_classes()["worker"].model_fields["drain_s"].default


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.stem)
def test_a_unit_has_no_privilege_and_no_password(unit: Path) -> None:
    said = service(unit)
    assert (said["User"], said["CapabilityBoundingSet"], said["NoNewPrivileges"]) == ("basic", "", "yes")
    assert said["ProtectSystem"] == "strict"
    assert said["BindReadOnlyPaths"].endswith(":/run/secrets")
    assert "Environment" not in said


def test_the_environment_file_has_settings_of_ours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "deploy/systemd/basic.env").read_text()
    pairs = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
    known = {f"BASIC_{name.upper()}" for kind in settings_classes().values() for name in kind.model_fields}
    assert pairs.keys() - known == {"HF_HOME"}
    for name, value in pairs.items():
        monkeypatch.setenv(name, value)
    settings_classes()["worker"]()


@pytest.mark.parametrize(
    ("text", "size", "read_timeout", "idle"),
    [
        (NGINX, r"client_max_body_size (\d+)(m);", r"proxy_read_timeout (\d+)s;", r"keepalive_timeout (\d+)s;"),
        (CADDY, r"max_size (\d+)(MB)", r"response_header_timeout (\d+)s", r"keepalive (\d+)s"),
    ],
    ids=["nginx", "caddy"],
)
def test_a_proxy_passes_all_that_the_api_server_accepts_for_as_long_as_it_takes(
    text: str, size: str, read_timeout: str, idle: str
) -> None:
    def found(pattern: str) -> tuple[str, ...]:
        (groups,) = [match.groups() for match in re.finditer(pattern, text)]
        return groups

    number, unit = found(size)
    assert int(number) * MEGABYTE[unit] > max(LIMITS.max_body_bytes, LIMITS.max_file_bytes)
    assert int(found(read_timeout)[0]) > LIMITS.interactive_timeout_s
    assert int(found(idle)[0]) < _KEEP_ALIVE_S
    assert f"127.0.0.1:{LIMITS.api_port}" in text


def test_a_proxy_holds_no_event_back_and_sends_no_call_twice() -> None:
    assert "proxy_buffering off;" in NGINX
    assert "proxy_request_buffering off;" in NGINX
    assert "proxy_next_upstream off;" in NGINX
    assert "proxy_set_header Upgrade $http_upgrade;" in NGINX
    assert "flush_interval -1" in CADDY


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_reads_its_file(tmp_path: Path) -> None:
    text = re.sub(r"ssl_certificate.*;", "", NGINX).replace("443 ssl", "8443")
    paths = "".join(f"{of}_temp_path {tmp_path}/{of}; " for of in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{ access_log off; {paths}{text} }}\n"
    )
    command = ["nginx", "-t", "-e", str(tmp_path / "log"), "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("caddy") is None, reason="Caddy is not installed")
def test_caddy_reads_its_file() -> None:
    command = ["caddy", "validate", "--adapter", "caddyfile", "--config", str(ROOT / "deploy/proxy/Caddyfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
