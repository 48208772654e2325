"""A short `make chaos`: after a few faults of every part, no request is lost, repeated or changed."""

from __future__ import annotations

import pytest

from tests.chaos.run import run

FAULTS = {
    "sqlite": ["kill a worker", "flush redis", "fill the disk", "kill the api server"],
    "postgresql": ["kill all workers", "restart the database", "replace redis", "cut database connections"],
}


@pytest.mark.parametrize("database", [pytest.param("sqlite", marks=pytest.mark.long), "postgresql"])
def test_faults_of_every_part_lose_double_and_change_nothing(database: str) -> None:
    report = run(len(FAULTS[database]), database, seed=7, only=FAULTS[database])

    assert report.wrong == []
    assert report.jobs > 1
    assert report.outputs == report.requests
    assert report.errors == {}
