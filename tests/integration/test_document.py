"""The OpenAPI document is right: calls generated from it get documented responses, and never a 5xx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jobs.api.app import make_api
from jobs.settings import JobsSettings
from storage import schema as database_schema
from storage import writes
from storage.session import Database
from tests.factories import a_worker_card
from tests.unit.jobs.api.test_routes import answer_all

EXAMPLES = 8  # of calls of one route
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    data_dir: Path = tmp_path_factory.mktemp("document")
    own = JobsSettings(data_dir=data_dir, redis_url="redis://127.0.0.1:1/0", target="tiny", max_requests=100)
    database_schema.upgrade(own.resolved_database_url)
    database = Database.open(own.resolved_database_url)
    with database.write() as session:
        writes.register_worker(session, a_worker_card(target="tiny", context_tokens=100))
    app = make_api(own, database, lambda job_id, model: answer_all(database))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_calls_made_from_the_document_get_answers_that_it_knows(document: Any) -> None:
    # Streams that last until a job ends would never end here; tests/acceptance reads them.
    operations = [found.ok() for found in document.exclude(path_regex="/(events|metrics|readyz)").get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def call(case: schemathesis.Case[Any]) -> None:
            case.call_and_validate(checks=CHECKS)

        call()


def test_the_document_says_400_where_the_framework_would_say_422(document: Any) -> None:
    for path, methods in document.raw_schema["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
            assert {"4XX", "5XX"} <= operation["responses"].keys(), path
