"""Files through the real `openai` client, and by hand what that client never sends."""

from __future__ import annotations

import gzip
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from sqlalchemy import func, select, update

from jobs.settings import JobsSettings
from storage import files
from storage.models import File, FileChunk
from storage.session import Database
from tests.factories import a_key
from tests.unit.jobs.openai_client import checked, openai_on, uploaded

ODD_BYTES = "\ufeff{}\r\nnot json\x00\u2028é\n\n".encode() + b"\xff\xfe no newline"


@pytest.fixture
def settings(settings: JobsSettings) -> JobsSettings:
    return settings.model_copy(update={"max_file_bytes": 3_000_000})


def chunks_in(database: Database) -> int:
    with database.read() as session:
        return session.scalars(select(func.count()).select_from(FileChunk)).one()


@pytest.mark.parametrize("content", [b"", b"x", ODD_BYTES, bytes(range(256)) * 10_000, b"\r\n--" * 5000])
def test_a_file_downloads_as_it_was_uploaded(client: OpenAI, content: bytes) -> None:
    file = uploaded(client, content)
    assert (file.bytes, file.status, file.purpose) == (len(content), "processed", "batch")
    assert client.files.content(file.id).read() == content


def test_a_large_file_is_stored_in_chunks(client: OpenAI, database: Database) -> None:
    uploaded(client, b"x" * (2 * files.CHUNK_BYTES + 1))
    assert chunks_in(database) == 3


@pytest.mark.parametrize(("name", "kept"), [("a.jsonl.gz", "a.jsonl"), ("a.jsonl", "a.jsonl")])
def test_a_gzip_file_is_stored_unpacked(client: OpenAI, name: str, kept: str) -> None:
    content = ODD_BYTES + b"x" * 2_000_000
    file = uploaded(client, gzip.compress(content), name)
    assert (file.bytes, file.filename) == (len(content), kept)
    assert client.files.content(file.id).read() == content


def test_an_upload_in_a_gzip_body_is_unpacked_with_its_form(api: TestClient) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.gz"\r\n\r\n'
        + gzip.compress(b"{}")
        + b"\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    reply = api.post("/v1/files", content=gzip.compress(form), headers=headers)
    assert (reply.json()["filename"], reply.json()["bytes"]) == ("a", 2)


def test_fields_may_follow_the_file(api: TestClient) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\n\r\n'
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    )
    reply = api.post("/v1/files", content=form, headers={"content-type": "multipart/form-data; boundary=b"})
    assert reply.json()["bytes"] == 3


@pytest.mark.parametrize(
    ("name", "kept"),
    [("α β.jsonl", "α β.jsonl"), ("../../etc/passwd", "passwd"), ("C:\\x\\y.jsonl", "y.jsonl"), ("/", "file")],
)
def test_a_filename_is_stored_without_its_path(client: OpenAI, name: str, kept: str) -> None:
    assert uploaded(client, b"x", name).filename == kept


def test_a_file_expires_after_the_requested_time(client: OpenAI, database: Database) -> None:
    file = client.files.create(file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert checked(file).expires_at == file.created_at + 3600
    other = uploaded(client, b"y")
    assert other.expires_at == other.created_at + 30 * 86_400
    with database.write() as session:
        session.execute(update(File).where(File.id == file.id).values(expires_at=1.0))
    with pytest.raises(openai.NotFoundError):
        client.files.content(file.id)
    with database.write() as session:
        assert files.clear_files(session) == 1
    assert chunks_in(database) == 1


def test_a_deleted_file_is_gone_with_its_bytes(client: OpenAI, database: Database) -> None:
    file = uploaded(client, b"x")
    deleted = checked(client.files.delete(file.id))
    assert (deleted.id, deleted.deleted) == (file.id, True)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as refused:
            call(file.id)
        assert (refused.value.param, refused.value.code) == ("id", None)
    assert list(client.files.list()) == []
    with database.write() as session:
        files.clear_files(session)
    assert chunks_in(database) == 0


def test_pages_continue_after_a_deleted_file_and_are_not_shifted_by_new_ones(client: OpenAI) -> None:
    ids = [uploaded(client, b"x").id for _ in range(5)][::-1]
    first = client.files.list(limit=2)
    assert [file.id for file in first.data] == ids[:2]
    client.files.delete(ids[1])
    uploaded(client, b"new")
    assert [file.id for file in first.get_next_page().data] == ids[2:4]
    assert [file.id for file in client.files.list(limit=2, after=ids[3])] == ids[4:]
    assert [file.id for file in client.files.list(order="asc", purpose="batch")][:4] == [*ids[::-1][:3], ids[0]]
    assert list(client.files.list(purpose="batch_output")) == []


def test_a_file_is_visible_to_its_owner_only(api: TestClient, database: Database) -> None:
    alice, bob = (
        openai_on(api).with_options(api_key=a_key(database)["authorization"].removeprefix("Bearer ")) for _ in range(2)
    )
    hers = uploaded(alice, b"x").id
    assert list(alice.files.list()) != []
    assert list(bob.files.list()) == []
    for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(hers)
    with pytest.raises(openai.NotFoundError) as refused:
        bob.batches.create(input_file_id=hers, endpoint="/v1/completions", completion_window="24h")
    assert refused.value.param == "input_file_id"
    with pytest.raises(openai.BadRequestError):
        bob.files.list(after=hers)


@pytest.mark.parametrize(
    ("form", "expires_after_s"),
    [
        ({"custom_llm_provider": "openai", "target_model_names": "gpt-4o", "user": "me"}, 30 * 86_400),
        ({"expires_after": '{"anchor": "created_at", "seconds": 7200}'}, 7_200),
    ],
)
def test_fields_that_gateways_and_curl_add_to_an_upload_are_accepted(
    api: TestClient, form: dict[str, str], expires_after_s: int
) -> None:
    reply = api.post("/v1/files", data={"purpose": "batch"} | form, files={"file": ("a.jsonl", b"{}")})
    assert reply.status_code == 200, reply.text
    assert reply.json()["expires_at"] - reply.json()["created_at"] == expires_after_s


@pytest.mark.parametrize("said", ["7200", "{", "[" * 500, '{"anchor": "created_at", "seconds": 60}'])
def test_an_invalid_expiry_is_rejected_naming_the_field(api: TestClient, said: str) -> None:
    form = {"purpose": "batch", "expires_after": said}
    reply = api.post("/v1/files", data=form, files={"file": ("a.jsonl", b"{}")})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith("expires_after")


def test_a_file_without_a_name_is_accepted(api: TestClient) -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n--b--\r\n'
    )
    reply = api.post("/v1/files/", content=form, headers={"content-type": "multipart/form-data; boundary=b"})
    assert (reply.json()["filename"], reply.json()["bytes"]) == ("file", 2)


FORM = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": "batch"}}
BAD_UPLOADS: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    (FORM | {"data": {}}, 400, "missing_required_parameter", "purpose"),
    (FORM | {"data": {"purpose": "fine-tune"}}, 400, "invalid_value", "purpose"),
    (FORM | {"data": {"purpose": "batch", "porpoise": "x"}}, 400, "unknown_parameter", "porpoise"),
    (FORM | {"data": {"purpose": "b" * 2000}}, 400, "invalid_value", "purpose"),
    (FORM | {"files": {"data": ("a", b"x")}}, 400, "unknown_parameter", "data"),
    (FORM | {"files": [("file", ("a", b"x")), ("file", ("b", b"y"))]}, 400, "invalid_value", "file"),
    (FORM | {"files": {"file": ("n" * 256, b"x")}}, 400, "invalid_value", "file"),
    (FORM | {"files": {"file": ("a", b"x" * 3_000_001)}}, 413, "file_too_large", "file"),
    (FORM | {"files": {"file": ("a", b"x" * 3_100_000)}}, 413, "file_too_large", None),
    (
        FORM | {"data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"}},
        400,
        "invalid_value",
        "expires_after.seconds",
    ),
    (
        FORM | {"data": {"purpose": "batch", "expires_after[seconds]": "3600"}},
        400,
        "invalid_value",
        "expires_after.anchor",
    ),
    ({"json": {"purpose": "batch"}}, 415, None, None),
    ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 415, None, None),
    ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400, "invalid_value", None),
    (
        {
            "content": b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2_000_000,
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        400,
        "invalid_value",
        None,
    ),
    (FORM | {"headers": {"content-encoding": "br"}}, 415, None, None),
    (FORM | {"headers": {"content-encoding": "gzip"}}, 400, "invalid_value", None),
    (FORM | {"files": {"file": ("a.jsonl.gz", gzip.compress(b"x" * 5_000)[:-4])}}, 400, "invalid_value", None),
    (FORM | {"files": {"file": ("a.jsonl.gz", gzip.compress(bytes(10_000_000)))}}, 413, "file_too_large", "file"),
]


@pytest.mark.parametrize(("call", "status", "code", "param"), BAD_UPLOADS)
def test_an_invalid_upload_is_rejected_and_stores_nothing(
    api: TestClient, database: Database, call: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    reply = api.post("/v1/files", **call)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
    assert chunks_in(database) == 0
    assert api.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/files/%00'--", 404),
        ("GET", "/v1/files/file-unknown/content", 404),
        ("DELETE", "/v1/files/" + "x" * 500, 404),
        ("GET", "/v1/files?limit=0", 400),
        ("GET", "/v1/files?limit=10001", 400),
        ("GET", "/v1/files?order=up", 400),
        ("GET", "/v1/files?after=file-unknown", 400),
        ("PUT", "/v1/files", 405),
    ],
)
def test_an_unknown_file_gets_the_error_object(api: TestClient, method: str, path: str, status: int) -> None:
    reply = api.request(method, path)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
