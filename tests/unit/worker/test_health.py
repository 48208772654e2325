"""`python -m worker.health`: healthy while the models of this host are served."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from storage import writes
from storage.session import Database
from tests.databases import write_migrated
from tests.factories import a_worker_card
from worker import health


def test_a_host_is_healthy_while_a_worker_serves_and_of_several_models_while_each_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_migrated(tmp_path / "basic.sqlite3")
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    monkeypatch.setenv("BASIC_DATABASE_URL", url)
    database = Database.open(url)

    def serve(worker_id: str, model: str, hostname: str) -> None:
        with database.write() as session:
            writes.register_worker(session, a_worker_card(id=worker_id, target=model, hostname=hostname))

    serve("elsewhere", "tiny", "another-host")
    assert health.main() == 1
    serve("here", "tiny", socket.gethostname())
    assert health.main() == 0
    capsys.readouterr()
    monkeypatch.setenv("BASIC_TARGET", "/models/tiny,/models/other")
    assert health.main() == 1
    assert "that serves other has sent a heartbeat" in capsys.readouterr().err
    serve("beside", "other", socket.gethostname())
    assert health.main() == 0
    database.dispose()
