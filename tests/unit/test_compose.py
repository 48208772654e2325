"""docker-compose.yml is valid by the published schema, and its rules for privileges, secrets and versions hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML
from sqlalchemy import make_url

from jobs.local.redis_server import SERVER_OPTIONS
from jobs.verification.signature import check_signature, public_key_of, signed
from storage.settings import StorageSettings
from tests.paths import ROOT

FILES = [ROOT / "docker-compose.yml", ROOT / "docs/compose-cpu.yml"]
ONCE = {"migrate"}  # runs to its end
NOTHING = "''"  # in a shell
UNSEEN = {"ingest"}  # has no port; it exits by itself when it is stuck


def read(file: Path) -> Any:
    return json.loads(json.dumps(YAML(typ="rt").load(file)))  # merge keys resolved, plain values


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    said: dict[str, Any] = read(FILES[0])
    return said


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_file_is_valid_by_the_compose_specification(file: Path) -> None:
    schema = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(read(file), json.loads(schema.read_text()))


def has_compose() -> bool:
    command = ["docker", "compose", "version"]
    return bool(shutil.which("docker")) and not subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
def test_docker_itself_reads_the_files() -> None:
    for files in (FILES[:1], FILES):
        arguments = [word for file in files for word in ("--file", str(file))]
        done = subprocess.run(["docker", "compose", *arguments, "config"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_nothing_runs_as_root_or_with_a_privilege(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert re.fullmatch(r"[1-9][0-9]*:[0-9]+", service["user"]), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & service.keys(), name


def test_every_image_has_a_digest_and_every_server_a_health_check(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        image = service["image"]
        assert "build" in service or re.search(r":v?\d+\.\d+\.?\d*(-\w+)?@sha256:[0-9a-f]{64}$", image), name
        assert name in ONCE | UNSEEN or "healthcheck" in service, name


def test_ports_are_on_loopback_and_data_services_have_no_outside_network(
    services: dict[str, dict[str, Any]],
) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert services["redis"]["networks"] == services["postgres"]["networks"] == ["inside"]


def test_the_migration_runs_once_before_services_that_need_the_database(
    services: dict[str, dict[str, Any]],
) -> None:
    assert services["migrate"]["restart"] == "no"
    for name in ("api", "ingest", "worker"):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_redis_has_the_options_of_the_embedded_server(services: dict[str, dict[str, Any]]) -> None:
    command = services["redis"]["command"][-1]
    rules = [f"--{name} {value or NOTHING} " for name, value in SERVER_OPTIONS.items()]
    assert [rule for rule in rules if rule not in command] == []


def test_passwords_come_only_from_files_and_the_script_writes_all_of_them(
    compose: dict[str, Any], services: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "secrets"
    for _ in range(2):  # existing files stay
        subprocess.run(["sh", str(ROOT / ".ci/make-secrets"), str(folder)], check=True, capture_output=True)
        written = {file.name: file.read_text() for file in folder.iterdir()}
    assert {f"./secrets/{name}" for name in written} == {secret["file"] for secret in compose["secrets"].values()}
    used = {secret for service in services.values() for secret in service.get("secrets", [])}
    assert used == compose["secrets"].keys() == written.keys()
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            assert "PASSWORD" not in name or value.startswith("/run/secrets/")
    assert make_url(written["basic_database_url"]).password == written["postgres_password"]
    assert written["redis_password"] in written["basic_redis_url"]
    assert folder.stat().st_mode & 0o077 == 0
    signing_key = written["basic_signing_key"]
    assert check_signature(signed({"a": 1}, signing_key)) == public_key_of(signing_key)


def test_settings_are_read_from_secret_files_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BASIC_DATABASE_URL", raising=False)
    (tmp_path / "basic_database_url").write_text("sqlite:///secret.sqlite3\n")
    monkeypatch.setitem(StorageSettings.model_config, "secrets_dir", tmp_path)
    assert StorageSettings().database_url == "sqlite:///secret.sqlite3"
    monkeypatch.setenv("BASIC_DATABASE_URL", "sqlite:///given.sqlite3")
    assert StorageSettings().database_url == "sqlite:///given.sqlite3"
