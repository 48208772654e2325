"""`basic keys`, as a person types it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jobs.cli.app import app
from jobs.client import AsyncClient
from jobs.errors import BasicError
from jobs.keys import check_key
from jobs.local.key import make_local_key, read_local_key
from jobs.local.state import LocalService, data_dir_lock, write_service
from jobs.settings import JobsSettings
from storage.session import Database


def basic(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments])


def test_a_key_is_shown_once_works_until_it_is_revoked_and_is_listed_without_its_secret() -> None:
    made = json.loads(basic("create", "alice", "--scope", "read", "--requests-per-minute", "5", "--json").stdout)
    record = Database.open(JobsSettings().resolved_database_url)
    found = check_key(record, made["key"])
    assert found is not None
    assert (found.name, found.scopes, found.max_requests_per_minute) == ("alice", ("read",), 5)

    listed = basic("list", "--json").stdout
    assert made["key"].rpartition("-")[2] not in listed
    assert json.loads(listed)[0]["opens"] is True

    assert basic("revoke", "alice").exit_code == 0
    assert check_key(record, made["key"]) is None
    assert json.loads(basic("list", "--json").stdout)[0]["opens"] is False
    assert "revoked" in basic("list").stdout
    record.dispose()


@pytest.mark.usefixtures("migrated")
def test_create_prints_only_the_key_on_standard_output_and_explains_it_on_standard_error() -> None:
    result = basic("create", "bob")
    assert result.stdout.startswith("sk-basic-")
    assert len(result.stdout.splitlines()) == 1
    assert "not shown again" in result.stderr
    assert "every /v1 request needs a key now" in result.stderr
    assert "first key" not in basic("create", "bob").stderr


@pytest.mark.usefixtures("migrated")
def test_a_key_from_a_file_is_stored_once(tmp_path: Path) -> None:
    file = tmp_path / "basic_api_key"
    key = f"sk-basic-{'ab' * 8}-{'cd' * 32}"
    file.write_text(f"{key}\n")
    for said in ("Stored the key", "stored already"):
        result = basic("create", "admin", "--scope", "admin", "--key-file", str(file))
        assert result.exit_code == 0
        assert said in result.stdout
        assert key not in result.output
    assert len(json.loads(basic("list", "--json").stdout)) == 1
    record = Database.open(JobsSettings().resolved_database_url)
    found = check_key(record, key)
    assert found is not None
    assert found.scopes == ("admin",)
    record.dispose()

    file.write_text(key[:-1] + "e")
    refused = basic("create", "admin", "--key-file", str(file))
    assert isinstance(refused.exception, BasicError)
    assert "the id of another key" in str(refused.exception)


@pytest.mark.usefixtures("migrated")
def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    refused = basic("create", "admin", "--key-file", str(tmp_path / "empty"))
    assert isinstance(refused.exception, BasicError)
    assert "--key-file: a key is sk-basic-" in str(refused.exception)
    missing = basic("create", "admin", "--key-file", str(tmp_path / "missing"))
    assert missing.exit_code == 2
    assert "No such file" in missing.output


@pytest.mark.usefixtures("migrated")
def test_keys_with_the_same_name_are_revoked_by_id() -> None:
    first, second = (json.loads(basic("create", "twin", "--json").stdout)["id"] for _ in range(2))
    refused = basic("revoke", "twin")
    assert isinstance(refused.exception, BasicError)
    assert first in str(refused.exception)
    assert basic("revoke", first).exit_code == 0
    assert second in basic("revoke", "twin").stdout
    assert isinstance(basic("revoke", "nobody").exception, BasicError)


@pytest.mark.usefixtures("migrated")
@pytest.mark.parametrize(
    "arguments",
    [
        ["x", "--scope", "root"],
        ["x", "--expires-in", "soon"],
        ["x", "--requests-per-minute", "0"],
        ["x", "--max-tokens-queued", "-1"],
        ["evil\x1b[31m"],
        ["x" * 101],
    ],
)
def test_invalid_options_create_no_key(arguments: list[str]) -> None:
    assert basic("create", *arguments).exit_code == 2
    assert json.loads(basic("list", "--json").stdout) == []


def test_the_local_key_is_sent_only_to_the_local_service(settings: JobsSettings) -> None:
    make_local_key(settings.data_dir)
    key = read_local_key(settings.data_dir)
    make_local_key(settings.data_dir)
    assert key == read_local_key(settings.data_dir)
    assert (settings.data_dir / "local.key").stat().st_mode & 0o077 == 0
    with data_dir_lock(settings.data_dir):
        write_service(LocalService("http://127.0.0.1:9", "", "", str(settings.data_dir), os.getpid()))
        ours, theirs = AsyncClient(), AsyncClient("http://192.0.2.1:8000")
    assert ours._connection.headers["authorization"] == f"Bearer {key}"
    assert "authorization" not in theirs._connection.headers
