"""The query of deploy/kubernetes/gpu-scaled counts, on the schema of this version, the requests that need a worker."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML
from sqlalchemy import text

from storage.session import Database
from tests.paths import ROOT
from tests.unit.storage.acts import claim, flush, record, whole

SCALED = ROOT / "deploy/kubernetes/gpu-scaled/scaled-object.yaml"


@pytest.fixture
def query() -> str:
    scaled, _ = YAML(typ="safe").load_all(SCALED.read_text())
    said: str = scaled["spec"]["triggers"][0]["metadata"]["query"]
    return said.replace("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "tiny")


def test_queued_and_running_requests_of_the_model_count_and_ended_ones_do_not(database: Database, query: str) -> None:
    def needed() -> int:
        with database.read() as session:
            return int(session.scalar(text(query)))

    assert needed() == 0
    record(database, "job-1", 3)
    record(database, "job-2", 2, model="another")
    assert needed() == 3
    (first, _) = claim(database, limit=2)
    assert needed() == 3, "an autoscaler must not take a worker away while it decodes"
    flush(database, "w1", whole(first.lease, 1, 2))
    assert needed() == 2
