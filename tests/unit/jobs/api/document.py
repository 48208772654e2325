"""The OpenAPI document, written once a process: that takes longer than any test of it."""

from __future__ import annotations

from functools import cache
from typing import Any

from jobs.api.app import make_api
from jobs.settings import JobsSettings
from storage.session import Database
from tests.api_client import ApiClient


@cache
def openapi_document() -> dict[str, Any]:
    """Return the document that the API server sends; it depends neither on settings nor on the database."""
    app = make_api(JobsSettings(target="tiny"), Database.open("sqlite://"), lambda *_: None)
    found: dict[str, Any] = ApiClient(app).get("/openapi.json").json()
    return found
