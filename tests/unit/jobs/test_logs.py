from __future__ import annotations

import json
import logging

import pytest

from jobs.logs import log_to_stderr, without_secrets
from jobs.settings import JobsSettings

SECRETS = [
    "redis://:hunter2@localhost:6379/0",
    "rediss://user:hunter2@redis.example:6380/0?ssl_cert_reqs=required",
    "postgresql+psycopg://basic:hunter2@db/basic?sslmode=verify-full",
    "postgresql://db/basic?user=basic&password=hunter2",
]


@pytest.mark.parametrize("url", SECRETS)
def test_passwords_of_urls_are_blotted_out_and_the_rest_is_kept(url: str) -> None:
    said = without_secrets(f"no answer at {url}, trying again")

    assert "hunter2" not in said
    assert said.startswith(f"no answer at {url.partition(':')[0]}://")
    assert said.endswith(", trying again")


@pytest.mark.parametrize("text", ["redis://127.0.0.1:6379/0", "see user@host: no", "ratio 3:4@5", "sqlite:////a/b@c"])
def test_what_is_no_password_is_left_alone(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("url", SECRETS)
def test_no_log_line_carries_a_password_also_not_in_a_traceback(
    log_format: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.getLogger().handlers[:]
    try:
        log_to_stderr(log_format)
        try:
            raise ConnectionError(f"can't reach {url}")
        except ConnectionError:
            logging.getLogger("somebody.else").exception("lost %s", url, extra={"action": "lost"})
    finally:
        logging.getLogger().handlers[:] = before
    said = capsys.readouterr().err
    assert "ConnectionError" in said
    assert "hunter2" not in said
    if log_format == "json":
        assert json.loads(said)["action"] == "lost"


def test_settings_that_are_printed_show_no_url() -> None:
    shown = repr(JobsSettings(redis_url=SECRETS[0], database_url=SECRETS[2], api_key="hunter2"))
    assert "hunter2" not in shown
