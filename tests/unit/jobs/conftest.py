from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from jobs.settings import JobsSettings
from storage.session import Database
from tests.databases import on_shared_sqlite, write_migrated

_NUMBERS = count()


@pytest.fixture(autouse=True)
def _environment_of_its_own(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Remove settings of the user's environment. A test that asks for no folder gets the name of a new one."""
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    else:
        folder = tmp_path_factory.getbasetemp() / f"data-{next(_NUMBERS)}"
    for name in os.environ:
        if name.startswith("BASIC_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BASIC_DATA_DIR", str(folder))


@pytest.fixture
def settings(tmp_path: Path) -> JobsSettings:
    """Settings of a service whose Redis server is down and whose limits are low."""
    return _limited().model_copy(update={"data_dir": tmp_path})


@cache
def _limited() -> JobsSettings:
    """Read the environment once: it takes as long as a small test."""
    return JobsSettings(redis_url="redis://127.0.0.1:1/0", target="tiny", max_requests=5, max_body_bytes=10_000)


@pytest.fixture
def migrated(settings: JobsSettings) -> None:
    """The database of the settings is at the newest version: migrating it takes longer than most tests."""
    write_migrated(Path(settings.resolved_database_url.removeprefix("sqlite:///")))


@pytest.fixture
def database(settings: JobsSettings) -> Iterator[Database]:
    """An empty database."""
    with on_shared_sqlite(settings.data_dir) as database:
        yield database
