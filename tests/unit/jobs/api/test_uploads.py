"""Uploads in parts, through the real `openai` client, and through the client that continues them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import func, select, update

from jobs.api.app import make_api
from jobs.api.schemas.uploads import UploadPartReply, UploadReply
from jobs.client import Client, async_client, uploads
from jobs.errors import ServiceUnavailable
from jobs.settings import JobsSettings
from storage.models import FileChunk, UploadRow
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_key
from tests.in_process import InProcess
from tests.unit.jobs.openai_client import openai_on

CONTENT = b'"Name a river."\n' * 100_000  # 1.6 MB: more than a chunk


@pytest.fixture
def api(settings: JobsSettings, database: Database) -> Iterator[TestClient]:
    settings = settings.model_copy(
        update={"max_file_bytes": 3_000_000, "max_body_bytes": 3_000_000, "max_requests": 200_000}
    )
    with ApiClient(make_api(settings, database, lambda *_: None), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(api: TestClient) -> OpenAI:
    return openai_on(api)


def begun(client: OpenAI, size: int = len(CONTENT)) -> str:
    return client.uploads.create(filename="a.jsonl", purpose="batch", bytes=size, mime_type="text/plain").id


def sent(client: OpenAI, upload_id: str, *parts: bytes) -> list[str]:
    return [client.uploads.parts.create(upload_id, data=part).id for part in parts]


def chunks(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(FileChunk)).one()


def test_parts_become_a_file_in_the_order_that_their_ids_are_given(client: OpenAI, database: Database) -> None:
    upload_id = begun(client)
    second, first, spare = sent(client, upload_id, CONTENT[1_200_000:], CONTENT[:1_200_000], b"spare")
    done = client.uploads.complete(upload_id, part_ids=[first, second], md5=hashlib.md5(CONTENT).hexdigest())
    assert (done.status, done.bytes) == ("completed", len(CONTENT))
    assert done.file is not None
    assert (done.file.bytes, done.file.filename) == (len(CONTENT), "a.jsonl")
    assert client.files.content(done.file.id).read() == CONTENT
    assert chunks(database) == 3, "the spare part is gone"
    again = client.uploads.complete(upload_id, part_ids=[spare])
    assert again.file == done.file, "the first call decides"
    with pytest.raises(openai.ConflictError, match="completed"):
        client.uploads.parts.create(upload_id, data=b"late")


def test_a_cancelled_upload_leaves_no_part(client: OpenAI, database: Database) -> None:
    upload_id = begun(client)
    part = sent(client, upload_id, CONTENT)[0]
    assert client.uploads.cancel(upload_id).status == "cancelled"
    assert chunks(database) == 0
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.uploads.complete(upload_id, part_ids=[part])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"filename": "a", "purpose": "batch"}, "bytes"),
        ({"filename": "a", "purpose": "batch", "bytes": 0}, "bytes"),
        ({"filename": "a", "purpose": "batch", "bytes": 3_000_001}, "bytes"),
        ({"filename": "a", "purpose": "fine-tune", "bytes": 1}, "purpose"),
        ({"filename": "", "purpose": "batch", "bytes": 1}, "filename"),
        ({"filename": "a", "purpose": "batch", "bytes": 1, "expires_after": {"anchor": "now"}}, "expires_after.anchor"),
        ({"filename": "a", "purpose": "batch", "bytes": 1, "size": 1}, "size"),
    ],
)
def test_an_invalid_upload_is_refused_with_its_field(api: TestClient, body: dict[str, Any], param: str) -> None:
    reply = api.post("/v1/uploads", json=body)
    assert (reply.status_code in (400, 413), reply.json()["error"]["param"]) == (True, param)


def test_parts_that_do_not_make_the_file_are_refused_and_can_be_sent_again(client: OpenAI, api: TestClient) -> None:
    upload_id = begun(client, 6)
    first, second, packed = sent(client, upload_id, b"abc", b"def", b"\x1f\x8babcd")
    wrong: list[dict[str, Any]] = [
        {"part_ids": [first]},
        {"part_ids": [first, first]},
        {"part_ids": [first, "part_of_another"]},
        {"part_ids": [packed]},
        {"part_ids": []},
        {"part_ids": [first, second], "md5": "0" * 32},
    ]
    for body in wrong:
        reply = api.post(f"/v1/uploads/{upload_id}/complete", json=body)
        assert reply.status_code == 400, body
        assert reply.json()["error"]["param"].startswith("md5" if "md5" in body else "part_ids")
    assert api.post("/v1/uploads/upload_none/complete", json=wrong[0]).status_code == 404
    assert api.post(f"/v1/uploads/{upload_id}/parts", files={"file": b"x"}).json()["error"]["param"] == "file"
    assert client.uploads.complete(upload_id, part_ids=[first, second]).status == "completed"


def test_an_upload_expires_and_belongs_to_its_key(client: OpenAI, api: TestClient, database: Database) -> None:
    upload_id = begun(client)
    path = f"/v1/uploads/{upload_id}"
    part = api.post(f"{path}/parts", files={"data": b"x"})
    assert UploadPartReply.model_validate_json(part.content, strict=True).bytes == 1
    assert UploadReply.model_validate_json(api.get(path).content, strict=True).parts[0].id == part.json()["id"]
    with database.write() as session:
        session.execute(update(UploadRow).values(expires_at=0.0))
    assert api.get(path).json()["status"] == "expired"
    assert api.post(f"{path}/parts", files={"data": b"x"}).status_code == 409
    assert api.get(path, headers=a_key(database)).status_code == 404


def test_a_job_is_made_from_an_uploaded_file(client: OpenAI, api: TestClient) -> None:
    file = client.files.create(
        file=("a.jsonl", b'{"parameters": {"seed": 3}}\n"one"\n{"prompt": ""}\n'), purpose="batch"
    )
    job = api.post("/v1/jobs", json={"input_file_id": file.id, "max_tokens": 5}).json()
    assert job["request_counts"] == {"total": 2, "completed": 0, "failed": 1}
    for bad in ({"input_file_id": "file-none"}, {"input_file_id": 7}, {"input_file_id": file.id, "requests": ["a"]}):
        assert api.post("/v1/jobs", json=bad).status_code in (400, 404)


class Breaking(InProcess):
    """A connection that breaks at one of its requests."""

    def __init__(self, app: Any, breaks_at: int) -> None:
        super().__init__(app)
        self.paths: list[str] = []
        self._breaks_at = breaks_at

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(request.url.path)
        if len(self.paths) == self._breaks_at:
            raise httpx.ConnectError("the network is gone")
        return super().handle_request(request)


def test_a_large_submission_continues_where_it_was_interrupted(
    api: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "user_state_path", lambda _: tmp_path)
    content = CONTENT[: len(CONTENT) // 100]
    monkeypatch.setattr(uploads, "PART_BYTES", -(-len(content) // 6))
    monkeypatch.setattr(async_client, "PARTED_BYTES", len(content) // 2)

    def submit(breaks_at: int) -> tuple[list[str], str | None]:
        connection = Breaking(api.app, breaks_at)
        with Client("http://service", transport=connection, patience_s=0.0) as client:
            try:
                return connection.paths, client.submit(content, max_tokens=4).id
            except ServiceUnavailable:
                return connection.paths, None

    interrupted, _ = submit(breaks_at=5)  # its begin, and 3 of 6 parts, have arrived
    assert sum(path.endswith("/parts") for path in interrupted) == 4
    continued, _ = submit(breaks_at=6)  # at the creation of the job
    assert sum(path.endswith("/parts") for path in continued) == 3
    last, job_id = submit(breaks_at=0)
    assert sum(path.endswith("/parts") for path in last) == 0
    assert api.get(f"/v1/jobs/{job_id}").json()["request_counts"]["total"] == content.count(b"\n")
    assert list((tmp_path / "uploads").iterdir()) == []
    assert api.get("/v1/files").json()["data"] == [], "the job has its lines"
