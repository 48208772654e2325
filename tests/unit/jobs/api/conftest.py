"""An API in this process, and the `openai` client on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from jobs.api.app import make_api
from jobs.settings import JobsSettings
from storage.session import Database
from tests.api_client import ApiClient
from tests.unit.jobs.openai_client import openai_on


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    with ApiClient(make_api(settings, database, lambda *_: None), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(api: TestClient) -> OpenAI:
    return openai_on(api)
