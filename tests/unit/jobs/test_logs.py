from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from jobs.api.app import make_api
from jobs.logs import log_context, log_to_stderr, without_secrets
from jobs.settings import JobsSettings
from storage.session import Database
from tests.api_client import ApiClient
from tests.databases import on_sqlite
from tests.unit.worker.serving.test_runner import Worker, submit

SECRETS = [
    "redis://:hunter2@localhost:6379/0",
    "rediss://user:hunter2@redis.example:6380/0?ssl_cert_reqs=required",
    "postgresql+psycopg://basic:hunter2@db/basic?sslmode=verify-full",
    "postgresql://db/basic?user=basic&password=hunter2",
]


@contextmanager
def logging_to_stderr(log_format: str) -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        log_to_stderr(log_format)
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)


@pytest.mark.parametrize("url", SECRETS)
def test_passwords_in_urls_are_masked_and_the_rest_is_kept(url: str) -> None:
    said = without_secrets(f"no answer at {url}, trying again")

    assert "hunter2" not in said
    assert said.startswith(f"no answer at {url.partition(':')[0]}://")
    assert said.endswith(", trying again")


@pytest.mark.parametrize("text", ["redis://127.0.0.1:6379/0", "see user@host: no", "ratio 3:4@5", "sqlite:////a/b@c"])
def test_text_without_passwords_is_unchanged(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("url", SECRETS)
def test_no_log_line_carries_a_password_also_not_in_a_traceback(
    log_format: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to_stderr(log_format):
        try:
            raise ConnectionError(f"can't reach {url}")
        except ConnectionError:
            logging.getLogger("somebody.else").exception("lost %s", url, extra={"action": "lost"})
    said = capsys.readouterr().err
    assert "ConnectionError" in said
    assert "hunter2" not in said
    if log_format == "json":
        assert json.loads(said)["action"] == "lost"


def test_settings_that_are_printed_show_no_url() -> None:
    shown = repr(JobsSettings(redis_url=SECRETS[0], database_url=SECRETS[2], api_key="hunter2"))
    assert "hunter2" not in shown


def lines(said: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines()]


def test_log_lines_of_libraries_carry_job_and_request_ids_too(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("json"):
        with log_context(job_id="batch_1", request_index=3):
            logging.getLogger("somebody.else").warning("odd text")
            logging.getLogger("ours").warning("of another", extra={"job_id": "batch_2"})
        logging.getLogger("somebody.else").warning("later")

    first, second, third = lines(capsys.readouterr().err)

    assert (first["job_id"], first["request_index"]) == ("batch_1", 3)
    assert second["job_id"] == "batch_2"
    assert not {"job_id", "request_index"} & set(third)


def test_text_lines_have_the_ids_at_their_end_before_any_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("text"), log_context(job_id="batch_1", request_index=0):
        try:
            raise ValueError("no")
        except ValueError:
            logging.getLogger("ours").exception("lost")

    first, *rest = capsys.readouterr().err.splitlines()

    assert first.endswith("lost [job batch_1, request 0]")
    assert "ValueError: no" in rest


def test_a_line_without_ids_ends_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("text"):
        logging.getLogger("ours").warning("Ready")
    assert capsys.readouterr().err.endswith("ours: Ready\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_api_server_logs_the_call_and_job_of_each_line(
    log_format: str,
    settings: JobsSettings,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr("storage.queries.job", away)
    api = make_api(settings, database, notify=lambda job_id, model: True)
    with logging_to_stderr(log_format), ApiClient(api, raise_server_exceptions=False) as client:
        reply = client.get("/v1/jobs/batch_0123/stats")
    assert reply.status_code == 503
    said = [line for line in capsys.readouterr().err.splitlines() if "The database does not answer" in line]
    call = reply.headers["x-request-id"]
    if log_format == "json":
        assert [(line["job_id"], line["request_id"]) for line in lines("\n".join(said))] == [("batch_0123", call)]
    else:
        assert [line.partition(" [")[2] for line in said] == [f"job batch_0123, call {call}]"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_worker_logs_which_request_failed_and_which_job_ended(
    log_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with on_sqlite(tmp_path) as database, logging_to_stderr(log_format):
        submit(database, "one", "x" * 500)
        Worker(database, "a").run()
    said = capsys.readouterr().err
    if log_format == "json":
        by_action = {line["action"]: line for line in lines(said) if "action" in line}
        failed, ended = by_action["request_failed"], by_action["job_ended"]
        assert (failed["job_id"], failed["request_index"], ended["job_id"]) == ("batch_1", 1, "batch_1")
    else:
        assert "[job batch_1, request 1]" in said
        assert "Job batch_1 is completed [job batch_1]" in said


FORGED = "2026-11-29 12:00:00,000 INFO    jobs.ingest: forged"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_text_of_a_caller_adds_no_log_line(log_format: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = f"a{end}{FORGED}"
    with logging_to_stderr(log_format), log_context(job_id=given):
        logging.getLogger("ours").warning("Batch %s is refused: custom_id %s", given, given, extra={"batch_id": given})
    (line,) = capsys.readouterr().err.splitlines()
    assert "forged" in line


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028"])
def test_the_text_of_an_exception_adds_no_line_that_looks_like_a_log_line(
    end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to_stderr("text"):
        try:
            raise ValueError(f"bad id a{end}{FORGED}")
        except ValueError:
            logging.getLogger("ours").exception("lost")
    said = capsys.readouterr().err
    assert "forged" in said
    assert not [line for line in said.splitlines() if line.startswith(FORGED)]


def test_text_of_a_caller_cannot_control_a_terminal_that_shows_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("text"):
        logging.getLogger("ours").warning("Batch %s", "\x1b[2J\x9b2J\u202e\ud800")
    assert capsys.readouterr().err.endswith("Batch \\x1b[2J\\x9b2J\\u202e\\ud800\n")
