"""Batches through the real `openai` client, with a real processor; the test acts as the worker."""

from __future__ import annotations

import bz2
import gzip
import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from openai import ConflictError, OpenAI
from openai.types import Batch, Completion, FileObject
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from sqlalchemy import select, update

from jobs.api.app import make_api
from jobs.batch_files import processor
from jobs.batch_files.processor import BatchFileProcessor
from jobs.messages import PartialEvent
from jobs.settings import JobsSettings
from storage import batches, files, leases, queries, writes
from storage.models import JobRow, Request
from storage.records import Claim, RequestFailure, RequestProgress
from storage.session import Database
from tests.api_client import ApiClient
from tests.factories import a_checkpoint, a_finished_choice
from tests.unit.jobs.api.document import openapi_document
from tests.unit.jobs.openai_client import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    a_batch,
    a_line,
    as_jsonl,
    checked,
    lines_of,
    openai_on,
    uploaded,
)


class World:
    """The API server, its client, and a processor that runs on demand."""

    def __init__(self, settings: JobsSettings, database: Database, api: TestClient) -> None:
        self.database = database
        self.settings = settings
        self.api = api
        self.client: OpenAI = openai_on(api)
        self.notified: list[tuple[str, str]] = []
        self.events: list[PartialEvent] = []
        self.processor = self.another_processor()

    def another_processor(self, lease_s: float = 30.0) -> BatchFileProcessor:
        notify = lambda job_id, model: self.notified.append((job_id, model))  # noqa: E731
        return BatchFileProcessor(self.database, self.settings, notify, self.events.extend, lease_s=lease_s)

    def claim(self, limit: int = 10) -> list[Claim]:
        with self.database.write() as session:
            return leases.claim(session, "w", "tiny", limit, 30.0)

    def answer(self, *claims: Claim, texts: tuple[str, ...] = ("Paris.",)) -> None:
        """Play the worker: write one choice per text."""
        choices = [
            a_finished_choice(text, choice_index=n, last_seq=2, first_of_prompt=n == 0) for n, text in enumerate(texts)
        ]
        written = [a_checkpoint(text, choice_index=n) for n, text in enumerate(texts)]
        self.flush(RequestProgress(c.lease, tuple(written), tuple(choices), ends=True) for c in claims)

    def flush(self, progress: Iterator[RequestProgress]) -> None:
        entries = list(progress)
        with self.database.write() as session:
            writes.flush(session, "w", 30.0, entries, [entry.lease for entry in entries], "fp_1")

    def overdue(self, batch_id: str) -> None:
        with self.database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == batch_id).values(expires_at=1.0))

    def end_what_is_cancelled(self) -> None:
        """Run the reconciler's part."""
        more = True
        while more:
            with self.database.write() as session:
                more = writes.end_jobs(session).more

    def work(self) -> None:
        """Let the processor do all there is."""
        self.processor.run_housekeeping()
        while self.processor.run_once():
            pass

    def read(self, batch_id: str) -> Any:
        return checked(self.client.batches.retrieve(batch_id))


@pytest.fixture
def settings(settings: JobsSettings) -> JobsSettings:
    return settings.model_copy(update={"max_requests": 2_000, "max_body_bytes": 1_000_000, "max_line_bytes": 2_000})


@pytest.fixture
def world(settings: JobsSettings, database: Database) -> Iterator[World]:
    with ApiClient(make_api(settings, database, lambda *_: None), raise_server_exceptions=False) as api:
        yield World(settings, database, api)


def test_a_batch_stops_at_its_budget_and_goes_on_when_it_is_raised(world: World) -> None:
    batch = a_batch(world.client, [a_line(name) for name in "abc"], extra_body={"budget": {"tokens": 10}})
    world.work()
    world.answer(*world.claim(2))
    assert world.api.get(f"/v1/jobs/{batch.id}").json()["status"] == "paused"
    assert (world.read(batch.id).status, world.claim()) == ("in_progress", [])
    raised = world.api.patch(f"/v1/jobs/{batch.id}", json={"budget": {"tokens": 100}})
    assert raised.json()["budget"] == {"tokens": 100, "seconds": None}
    assert world.api.post(f"/v1/jobs/{batch.id}/resume").status_code == 200
    world.answer(*world.claim())
    world.work()
    assert world.read(batch.id).status == "completed"


def test_a_batch_has_no_pilot_and_its_file_runs_as_a_job_with_one(world: World) -> None:
    file = uploaded(world.client, as_jsonl(a_line(name) for name in "abc"))
    asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", "pilot": True}
    refused = world.api.post("/v1/batches", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "pilot")
    assert "POST /v1/jobs" in refused.json()["error"]["message"]
    job = world.api.post("/v1/jobs", json=asked | {"pilot": {"requests": 1}})
    assert job.status_code == 200, job.text
    assert len(world.claim()) == 1, "the others wait for the pilot"


def test_a_batch_goes_from_input_file_to_output_files_and_reports_each_status(world: World) -> None:
    names = ["a", "ü\u2028", "bad", "refused"]
    lines = [a_line(name, body={"temperature": -1} if name == "bad" else {"stream": True}) for name in names]
    batch = a_batch(world.client, lines, metadata={"team": "ä"})
    assert (batch.status, batch.metadata, batch.model) == ("validating", {"team": "ä"}, None)
    assert batch.expires_at == batch.created_at + 86_400
    world.work()
    batch = world.read(batch.id)
    assert (batch.status, batch.model) == ("in_progress", "tiny")
    assert batch.in_progress_at >= batch.created_at
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 0, "failed": 1}
    assert world.notified == [(batch.id, "tiny")]

    first, second, last = world.claim()
    world.answer(first, second)
    world.flush(
        iter([RequestProgress(last.lease, failure=RequestFailure("context_length_exceeded", "too long", "messages"))])
    )
    batch = world.read(batch.id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("finalizing", None, None)
    world.work()
    batch = world.read(batch.id)
    assert batch.status == "completed"
    assert batch.completed_at >= batch.finalizing_at >= batch.in_progress_at
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}

    output = lines_of(world.client, batch.output_file_id)
    assert [line["custom_id"] for line in output] == names[:2]
    answers = [ChatCompletion.model_validate(line["response"]["body"]) for line in output]
    assert {(answer.choices[0].message.content, answer.system_fingerprint) for answer in answers} == {
        ("Paris.", "fp_1")
    }
    assert answers[0].id != answers[1].id
    assert [line["error"] for line in output] == [None, None]
    tokens = [answer.usage for answer in answers if answer.usage]
    assert batch.usage.total_tokens == sum(each.total_tokens for each in tokens) == 14
    errors = {line["custom_id"]: line["response"] for line in lines_of(world.client, batch.error_file_id)}
    assert {name: (r["status_code"], r["body"]["error"]["param"]) for name, r in errors.items()} == {
        "bad": (400, "temperature"),
        "refused": (400, "messages"),
    }
    assert {file.id for file in world.client.files.list(purpose="batch_output")} == {
        batch.output_file_id,
        batch.error_file_id,
    }
    assert [(event.type, event.status) for event in world.events] == [("job", "completed")]
    assert world.read(batch.id) == batch


def test_choices_of_several_prompts_are_prompt_major_and_prompts_count_once(world: World) -> None:
    body = {"prompt": [[1, 2], [3]], "n": 1, "best_of": 1, "messages": None}
    batch = a_batch(world.client, [a_line(url=COMPLETIONS, body=body)], endpoint=COMPLETIONS)
    world.work()
    (claim,) = world.claim()
    assert claim.body["prompts"] == [[1, 2], [3]]
    assert claim.body["sampling"]["max_tokens"] == 16
    world.answer(claim, texts=("one", "two"))
    world.work()
    (line,) = lines_of(world.client, world.read(batch.id).output_file_id)
    answer = Completion.model_validate(line["response"]["body"])
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "one"), (1, "two")]
    assert answer.usage is not None
    assert answer.usage.to_dict() == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


GOOD = a_line("good")
BAD_FILES: list[tuple[list[Any], list[tuple[str, int | None, str | None]]]] = [
    ([], [("empty_file", None, None)]),
    (["", "  "], [("empty_file", None, None)]),
    (["nope", "[1]", "7"], [("invalid_json_line", 1, None), ("invalid_json_line", 2, None)]),
    (["", '{"a": NaN}'], [("invalid_json_line", 2, None)]),
    (["[" * 1_500], [("invalid_json_line", 1, None)]),
    (['{"custom_id": "\\ud800"}'], [("invalid_json_line", 1, None)]),
    ([a_line("x" * 2_100)], [("invalid_json_line", 1, None)]),
    ([a_line(""), a_line("x" * 65)], [("invalid_request", 1, "custom_id"), ("invalid_request", 2, "custom_id")]),
    ([a_line("\0"), a_line(7)], [("invalid_request", 1, "custom_id"), ("invalid_request", 2, "custom_id")]),  # type: ignore[arg-type]
    ([{k: v for k, v in GOOD.items() if k != "custom_id"}], [("missing_required_parameter", 1, "custom_id")]),
    ([GOOD | {"method": None}], [("missing_required_parameter", 1, "method")]),
    ([GOOD | {"body": []}], [("invalid_request", 1, "body")]),
    ([GOOD, a_line("b"), GOOD], [("duplicate_custom_id", 3, "custom_id")]),
    ([GOOD | {"method": "GET"}], [("invalid_method", 1, "method")]),
    ([GOOD | {"url": COMPLETIONS}], [("invalid_url", 1, "url")]),
    ([a_line("m", body={"model": None})], [("missing_required_parameter", 1, "body.model")]),
    ([a_line("m", body={"model": "gpt-9"})], [("model_not_found", 1, "body.model")]),
    ([a_line(str(n)) for n in range(2_001)], [("too_many_tasks", None, None)]),
]


@pytest.mark.parametrize(("lines", "found"), BAD_FILES)
def test_an_invalid_input_file_fails_the_batch_naming_its_bad_lines(
    world: World, lines: list[Any], found: list[tuple[str, int | None, str | None]]
) -> None:
    batch = a_batch(world.client, lines)
    world.work()
    batch = world.read(batch.id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    errors = batch.errors.data or []
    assert [(error.code, error.line, error.param) for error in errors][: len(found)] == found
    assert all(error.message for error in errors)
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)
    assert world.claim() == []
    with pytest.raises(openai.ConflictError):
        world.client.batches.cancel(batch.id)


def broken(line: dict[str, Any], old: str, new: str) -> bytes:
    """A line with part of its text replaced; Latin-1 encodes bytes that are not UTF-8."""
    text = json.dumps(line)
    assert old in text
    return text.replace(old, new).encode("latin-1")


BAD = a_line("bad", body={"top_p": 0.5})
BAD_LINES = {
    "high half of a pair": (broken(BAD, "Hello", "Nice \\ud83d"), "bad"),
    "low half of a pair": (broken(BAD, "Hello", "\\udc4d nice"), "bad"),
    "halves the wrong way round": (broken(BAD, "Hello", "\\udc4d\\ud83d"), "bad"),
    "NaN": (broken(BAD, "0.5", "NaN"), "bad"),
    "Infinity": (broken(BAD, "0.5", "-Infinity"), "bad"),
    "more than all floats": (broken(BAD, "0.5", "1e999"), "bad"),
    "a huge number": (broken(BAD, "0.5", "9" * 1_000), "bad"),
    "latin-1": (broken(BAD, "Hello", "caf\xe9"), "bad"),
    "latin-1 in the id": (broken(BAD, "bad", "caf\xe9"), "caf\ufffd"),
    "a raw control character": (broken(BAD, "Hello", "a\x01b"), "bad"),
    "a raw NUL": (broken(BAD, "Hello", "a\0b"), "bad"),
    "a NUL in the name of a field": (broken(BAD, "top_p", "top\\u0000p"), "bad"),
    "deep nesting": (broken(BAD, "0.5", "[" * 600 + "]" * 600), "bad"),
    "more of it": (broken(BAD, "0.5", "[" * 1_700), "bad"),
    "a comma behind it": (json.dumps(BAD).encode() + b",", "bad"),
    "a comma too many": (broken(BAD, "0.5", "0.5,"), "bad"),
    "a byte order mark in the middle": (json.dumps(BAD).encode() + "\ufeff".encode() + json.dumps(BAD).encode(), "bad"),
    "Ctrl-Z in the middle": (json.dumps(BAD).encode() + b"\x1a" + json.dumps(BAD).encode(), "bad"),
    "a line in UTF-16": (json.dumps(BAD).encode("utf-16-le"), "request-1"),
    "two values": (json.dumps(BAD).encode() * 2, "bad"),
    "an end that is missing": (json.dumps(BAD).encode()[:-3], "bad"),
    "an end that is missing in a text": (broken(BAD, 'Hello"', "Hello"), "bad"),
    "a backslash too few": (broken(BAD, "Hello", 'say \\\\"custom_id": "other" to'), "bad"),
    "Python's own spelling": (str(BAD | {"x": None}).encode(), "bad"),
    "no object": (b"[1, 2]", "request-1"),
    "a text": (b'"Hello"', "request-1"),
    "nothing": (b"null", "request-1"),
    "a table": (b"id,prompt", "request-1"),
    "another endpoint": (json.dumps(BAD | {"url": COMPLETIONS}).encode(), "bad"),
    "another method": (json.dumps(BAD | {"method": "GET"}).encode(), "bad"),
    "no url": (json.dumps(BAD | {"url": None}).encode(), "bad"),
    "no body": (json.dumps(BAD | {"body": None}).encode(), "bad"),
    "a body that is none": (json.dumps(BAD | {"body": "Hello"}).encode(), "bad"),
    "another model": (json.dumps(a_line("bad", body={"model": "gpt-9"})).encode(), "bad"),
    "a model that is none": (json.dumps(a_line("bad", body={"model": ["tiny"]})).encode(), "bad"),
    "one more field": (json.dumps(BAD | {"metadata": {"row": "7"}}).encode(), "bad"),
    "one more field in the body": (json.dumps(a_line("bad", body={"surprise": 1})).encode(), "bad"),
    "a bad value": (json.dumps(a_line("bad", body={"top_p": 7})).encode(), "bad"),
    "a line that is too long": (json.dumps(a_line("bad", body={"user": "x" * 3_000})).encode(), "bad"),
    "an id that is a number": (json.dumps(BAD | {"custom_id": 7}).encode(), "7"),
    "an id that is too long": (json.dumps(BAD | {"custom_id": "x" * 65}).encode(), "x" * 65),
    "an id that no database holds": (json.dumps(BAD | {"custom_id": "a\0\ud83d"}).encode(), "a\ufffd\ufffd"),
    "an id that is a list": (json.dumps(BAD | {"custom_id": ["bad"]}).encode(), "request-1"),
    "an empty id": (json.dumps(BAD | {"custom_id": ""}).encode(), "request-1"),
    "no id": (json.dumps(BAD | {"custom_id": None}).encode(), "request-1"),
    "an id of another line": (broken(BAD, '"bad"', '"good", "n": NaN'), "request-1"),
}


def test_one_bad_line_fails_alone_and_its_id_survives(world: World) -> None:
    """Each bad line has good neighbours; it is at the top, in the middle and at the end of a batch."""
    lines, expected = [json.dumps(a_line("good")).encode()], {}
    for name, (line, custom_id) in BAD_LINES.items():
        place = len(lines)
        own = custom_id.replace("bad", f"bad{place}").replace("request-1", f"request-{place}")
        expected[name] = (own, f"line {place + 1}")
        lines += [line.replace(b"bad", f"bad{place}".encode()), json.dumps(a_line(f"after {name}")).encode()]
    whole = b"\n".join(lines)
    ends = b"\n".join([lines[1], lines[0], lines[3]])
    batches = []
    for content in (whole, ends):
        file = uploaded(world.client, content)
        batches.append(world.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id)
    world.work()
    counts = {"total": len(lines), "completed": 0, "failed": len(BAD_LINES)}
    assert world.read(batches[0]).request_counts.to_dict() == counts
    world.answer(*world.claim(limit=len(lines)))
    world.work()

    batch = world.read(batches[0])
    served = [line["custom_id"] for line in lines_of(world.client, batch.output_file_id)]
    assert served == ["good", *(f"after {name}" for name in BAD_LINES)]
    failed = lines_of(world.client, batch.error_file_id)
    for (name, (own, start)), answer in zip(expected.items(), failed, strict=True):
        assert answer["custom_id"] == own, name
        assert answer["response"]["body"]["error"]["message"].startswith(start), name
    batch = world.read(batches[1])
    assert [line["custom_id"] for line in lines_of(world.client, batch.output_file_id)] == ["good"]
    assert [line["custom_id"] for line in lines_of(world.client, batch.error_file_id)] == ["bad1", "bad3"]


def test_custom_ids_that_look_like_generated_ones_stay_with_their_lines(world: World) -> None:
    """Each id names one line, regardless of which lines are invalid."""
    given = ["request-1", None, "request-3", 7, "7", None, "request-5-unnamed", "request-5"]
    lines = [json.dumps(a_line() | {"custom_id": name}) for name in given]
    batch = a_batch(world.client, [*lines, '{"custom_id": "request-3", "x": NaN}', '{"custom_id": "broken", "x": NaN}'])
    world.work()
    world.answer(*world.claim())
    world.work()
    batch = world.read(batch.id)
    output = [line["custom_id"] for line in lines_of(world.client, batch.output_file_id)]
    errors = [line["custom_id"] for line in lines_of(world.client, batch.error_file_id)]
    assert output == ["request-1", "request-3", "7", "request-5-unnamed", "request-5"]
    assert errors == ["request-1-unnamed", "request-3-unnamed", "request-5-unnamed-unnamed", "request-8", "broken"]


@pytest.mark.parametrize(
    "line",
    [
        "\u00a0 ",
        "\u2028",
        "\ufeff",
        "\x1a",
        "\u200b\t",
        "\ufeff" + json.dumps(a_line("b")),
        json.dumps(a_line("b")) + "\x1a",
    ],
)
def test_invisible_differences_do_not_make_a_line_invalid(world: World, line: str) -> None:
    batch = a_batch(world.client, [GOOD, line])
    world.work()
    assert world.read(batch.id).request_counts.failed == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "post"},
        {"url": "/chat/completions"},
        {"url": f"{CHAT}/"},
        {"url": f"https://api.openai.com{CHAT}"},
        {"url": f"{CHAT}?api-version=2024-10-21"},
        {"url": "/openai/deployments/tiny/chat/completions"},
        {"method": None, "url": None},
        {"metadata": {}, "params": {}, "response": None, "id": "q"},
        {"body": GOOD["body"] | {"model": "openai/TINY"}},
    ],
)
def test_spellings_of_lines_of_other_services_are_accepted(world: World, changes: dict[str, Any]) -> None:
    batch = a_batch(world.client, [GOOD | changes])
    world.work()
    assert world.read(batch.id).request_counts.to_dict() == {"total": 1, "completed": 0, "failed": 0}


def test_lines_of_a_body_alone_run_on_the_model_that_some_line_names_or_on_the_only_one(world: World) -> None:
    """Together writes no method and url, Mistral no model either."""
    bare = [{"custom_id": name, "body": {"messages": GOOD["body"]["messages"]}} for name in "ab"]
    one, other = a_batch(world.client, bare), a_batch(world.client, [bare[0], a_line("t", method=None, url=None)])
    prompts = [{"custom_id": "p", "body": {"prompt": "Hello"}}]
    third = a_batch(world.client, [*prompts, *bare], endpoint=COMPLETIONS)
    world.work()
    assert [world.read(batch.id).model for batch in (one, other, third)] == ["tiny"] * 3
    assert [world.read(batch.id).request_counts.failed for batch in (one, other, third)] == [0, 0, 2]


def test_a_batch_takes_azure_s_name_of_its_endpoint(world: World) -> None:
    batch = a_batch(world.client, [GOOD], endpoint="/chat/completions")
    world.work()
    assert (world.read(batch.id).endpoint, world.read(batch.id).status) == (CHAT, "in_progress")


def test_a_batch_of_responses_has_response_objects_that_can_be_read_and_continued(world: World) -> None:
    asked = {"model": "tiny", "input": "Hello"}
    lines: list[dict[str, Any]] = [
        {"custom_id": name, "method": "POST", "url": RESPONSES, "body": asked | {"metadata": {"name": name}}}
        for name in "ab"
    ]
    lines.append({"custom_id": "c", "body": asked | {"conversation": "conv_1"}})
    batch = a_batch(world.client, lines, endpoint=RESPONSES)
    world.work()
    world.answer(*world.claim())
    world.work()
    written = lines_of(world.client, world.read(batch.id).output_file_id)
    bodies = [Response.model_validate(line["response"]["body"]) for line in written]
    assert [(body.output_text, body.metadata) for body in bodies] == [("Paris.", {"name": name}) for name in "ab"]
    (refused,) = lines_of(world.client, world.read(batch.id).error_file_id)
    assert refused["response"]["body"]["error"]["param"] == "conversation"
    responses = world.client.responses
    assert checked(responses.retrieve(bodies[1].id)).metadata == {"name": "b"}
    with pytest.raises(ConflictError, match="belongs to"):
        responses.cancel(bodies[1].id)
    after: Any = asked | {"previous_response_id": bodies[0].id, "background": True}
    assert checked(responses.create(**after)).status == "queued"


PRETTY = json.dumps([GOOD, GOOD], indent=2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bz2.compress(as_jsonl([GOOD])), "bzip2"),
        (b"PAR1\x15\x04\x15\n\x00PAR1", "Parquet"),
        (b"[\n" + as_jsonl([GOOD]) + b"]\n", "several lines"),
        (b"id;prompt\n1;hi\n2;yo\n", "CSV"),
        (b"\xef\xbb\xbf" + PRETTY.encode(), "several lines"),
        (as_jsonl([GOOD]).decode().encode("utf-16"), "UTF-16"),
        (json.dumps([GOOD] * 5).encode(), "JSON array"),
        (json.dumps([GOOD] * 2_000).encode(), "JSON array"),
        (PRETTY.encode(), "several lines"),
        (json.dumps(GOOD, indent=2).encode(), "several lines"),
        (as_jsonl([GOOD, GOOD]).replace(b"\n", b"\r"), "carriage return"),
        (b"id,prompt\n1,hi\n2,yo\n", "CSV"),
    ],
)
def test_a_file_that_is_not_json_lines_gets_one_error(world: World, content: bytes, said: str) -> None:
    file = uploaded(world.client, content)
    batch = world.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    world.work()
    (error,) = world.read(batch.id).errors.data
    assert (error.code, error.line) == ("invalid_json_line", 1)
    assert said in error.message


def test_a_gzip_file_is_a_batch_like_any_other(world: World) -> None:
    file = uploaded(world.client, gzip.compress(as_jsonl([GOOD, a_line("b")])), "input.jsonl.gz")
    batch = world.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    world.work()
    assert world.read(batch.id).request_counts.to_dict() == {"total": 2, "completed": 0, "failed": 0}


def test_lists_accept_order_status_and_an_empty_after(world: World) -> None:
    ids = [a_batch(world.client, [GOOD]).id, a_batch(world.client, ["nope"]).id]
    world.work()

    def listed(query: str) -> list[str]:
        return [batch["id"] for batch in world.api.get(f"/v1/batches{query}").json()["data"]]

    assert listed("?order=asc") == listed("/?after=")[::-1]
    assert (listed("?status=failed"), listed("?status=in_progress")) == ([ids[1]], [ids[0]])
    assert world.api.get("/v1/batches?order=up").json()["error"]["param"] == "order"


def test_the_number_of_reported_errors_is_limited(world: World) -> None:
    batch = a_batch(world.client, ["nope"] * 150)
    world.work()
    errors = world.read(batch.id).errors.data
    assert [error.line for error in errors] == list(range(1, 101))


def test_a_valid_line_after_many_invalid_ones_is_processed(world: World) -> None:
    batch = a_batch(world.client, ["nope"] * 150 + [GOOD])
    world.work()
    assert world.read(batch.id).request_counts.to_dict() == {"total": 151, "completed": 0, "failed": 150}


def test_windows_line_ends_and_a_byte_order_mark_are_accepted(world: World) -> None:
    content = b"\xef\xbb\xbf" + as_jsonl([a_line("a"), a_line("b")]).replace(b"\n", b"\r\n").rstrip() + b"\r\n\r\n"
    file = uploaded(world.client, content)
    batch = world.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="7d")  # type: ignore[arg-type]
    assert (batch.completion_window, batch.expires_at) == ("7d", batch.created_at + 7 * 86_400)
    world.client.files.delete(file.id)  # the batch continues
    world.work()
    assert world.read(batch.id).request_counts.total == 2


def test_cancelling_delivers_finished_requests_and_lists_the_rest_as_errors(world: World) -> None:
    batch = a_batch(world.client, [a_line(name) for name in "abc"])
    world.work()
    world.answer(*world.claim(1))
    (running,) = world.claim(1)
    for _ in range(2):
        cancelled = checked(world.client.batches.cancel(batch.id))
        assert (cancelled.status, cancelled.cancelling_at is not None) == ("cancelling", True)
    world.work()
    assert world.read(batch.id).status == "cancelling"  # one line is in flight
    world.answer(running)
    world.work()
    batch = world.read(batch.id)
    assert (batch.status, batch.cancelled_at is not None) == ("cancelled", True)
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 0}
    assert [line["custom_id"] for line in lines_of(world.client, batch.output_file_id)] == ["a"]
    rest = [
        (line["custom_id"], line["response"], line["error"]["code"])
        for line in lines_of(world.client, batch.error_file_id)
    ]
    assert rest == [("b", None, "batch_cancelled"), ("c", None, "batch_cancelled")]
    assert world.client.batches.cancel(batch.id) == batch


def test_a_batch_cancelled_during_validation_still_answers_every_line(world: World) -> None:
    batch = a_batch(world.client, [a_line("a"), a_line("b", body={"n": 0})])
    assert world.client.batches.cancel(batch.id).status == "cancelling"
    world.work()
    batch = world.read(batch.id)
    assert (batch.status, batch.output_file_id, world.notified) == ("cancelled", None, [])
    assert batch.request_counts.to_dict() == {"total": 2, "completed": 0, "failed": 1}
    assert {line["custom_id"] for line in lines_of(world.client, batch.error_file_id)} == {"a", "b"}
    bad = a_batch(world.client, ["nope"])
    world.client.batches.cancel(bad.id)
    world.work()
    assert world.read(bad.id).status == "cancelled"


@pytest.mark.parametrize("started", [False, True])
def test_an_expired_batch_delivers_its_finished_requests(world: World, started: bool) -> None:
    batch = a_batch(world.client, [a_line(name) for name in "abc"])
    if started:
        world.work()
        world.answer(*world.claim(1))
        world.claim(1)
    world.overdue(batch.id)
    world.work()
    world.work()
    batch = world.read(batch.id)
    assert (batch.status, batch.expired_at is not None) == ("expired", True)
    assert batch.request_counts.to_dict() == {"total": 3, "completed": int(started), "failed": 0}
    done = [line["custom_id"] for line in lines_of(world.client, batch.output_file_id)]
    errors = lines_of(world.client, batch.error_file_id)
    assert done + [line["custom_id"] for line in errors] == ["a", "b", "c"]
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}


def test_a_processor_that_dies_leaves_the_batch_to_the_next_and_writes_nothing_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while it stores requests or output files: none exists twice, and none is visible before all exist."""
    monkeypatch.setattr(processor, "_CHUNK_REQUESTS", 100)
    batch = a_batch(world.client, [a_line(f"{n}", body={"n": 0 if n % 50 == 0 else 1}) for n in range(150)])
    dying = world.another_processor(lease_s=-1.0)
    with world.database.write() as session:
        dead = batches.claim_batch(session, -1.0)
    assert dead is not None
    with monkeypatch.context() as patch:
        patch.setattr(batches, "start_batch", _die)
        with pytest.raises(_Killed):
            dying.run_once()
    assert world.read(batch.id).request_counts.total == 0
    assert world.claim() == []
    assert world.api.get(f"/v1/jobs/{batch.id}/outputs").text == ""

    world.work()
    assert world.read(batch.id).request_counts.to_dict() == {"total": 150, "completed": 0, "failed": 3}
    with world.database.read() as session:
        assert len(session.scalars(select(Request.custom_id).where(Request.job_id == batch.id)).all()) == 150
    with pytest.raises(batches.ClaimLost), world.database.write() as session:
        batches.renew_claim(session, dead, 30.0)

    world.client.batches.cancel(batch.id)
    world.end_what_is_cancelled()
    with monkeypatch.context() as patch:
        patch.setattr(files, "finish_file", _die)
        with pytest.raises(_Killed):
            dying.run_once()
    assert world.read(batch.id).error_file_id is None
    world.work()
    errors = lines_of(world.client, world.read(batch.id).error_file_id)
    assert [line["custom_id"] for line in errors] == [f"{n}" for n in range(150)]


class _Killed(Exception):
    pass


def _die(*_args: object, **_fields: object) -> None:
    raise _Killed


def test_a_stopped_processor_releases_its_batch(world: World) -> None:
    batch = a_batch(world.client, [GOOD])
    leaving = BatchFileProcessor(world.database, world.settings, lambda *_: None, lambda _: None, threading.Event())
    leaving.stop.set()
    leaving.run_once()
    assert world.read(batch.id).status == "validating"
    world.work()
    assert world.read(batch.id).status == "in_progress"


def test_batches_are_jobs_and_only_batches_are_listed_as_such(world: World) -> None:
    batch_ids = [a_batch(world.client, [GOOD]).id for _ in range(3)][::-1]
    inline = world.api.post("/v1/jobs", json={"prompts": ["x"]}).json()["id"]
    page = world.client.batches.list(limit=2)
    assert page.has_more
    assert [batch.id for batch in checked(page).data + page.get_next_page().data] == batch_ids
    assert [job["id"] for job in world.api.get("/v1/jobs").json()["data"]] == [inline, *batch_ids]
    job = world.api.get(f"/v1/jobs/{batch_ids[0]}").json()
    assert (job["status"], job["input_file_id"]) == ("validating", world.read(batch_ids[0]).input_file_id)
    with pytest.raises(openai.NotFoundError):
        world.client.batches.retrieve(inline)
    with pytest.raises(openai.BadRequestError):
        world.client.batches.list(after=inline)
    assert world.api.post(f"/v1/jobs/{batch_ids[0]}/cancel").json()["status"] == "cancelling"


def test_a_batch_asks_for_a_comparison_with_plain_decoding(world: World) -> None:
    batch = a_batch(world.client, [GOOD], extra_body={"compare_plain": 20})
    with world.database.read() as session:
        comparison = queries.job_stats(session, batch.id).comparison
    assert comparison is not None
    assert comparison.requests_asked == 20


def test_the_same_idempotency_key_and_body_give_the_same_batch(world: World) -> None:
    order = {"input_file_id": uploaded(world.client, b"x").id, "endpoint": CHAT, "completion_window": "24h"}
    key = {"idempotency-key": "k"}
    first, again = (world.api.post("/v1/batches", json=order, headers=key).json()["id"] for _ in range(2))
    assert first == again
    other = world.api.post("/v1/batches", json=order | {"metadata": {}}, headers=key)
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    assert first != world.api.post("/v1/batches", json=order).json()["id"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"input_file_id": None}, 400, "missing_required_parameter", "input_file_id"),
        ({"input_file_id": "file-unknown"}, 404, None, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, 400, "invalid_value", "endpoint"),
        ({"endpoint": None}, 400, "missing_required_parameter", "endpoint"),
        ({"completion_window": "soon"}, 400, "invalid_value", "completion_window"),
        ({"completion_window": 24}, 400, "invalid_value", "completion_window"),
        ({"metadata": {"k": "v" * 513}}, 400, "invalid_value", "metadata"),
        ({"compare_plain": 101}, 400, "invalid_value", "compare_plain"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            400,
            "invalid_value",
            "output_expires_after.seconds",
        ),
        ({"windows": "24h"}, 400, "unknown_parameter", "windows"),
    ],
)
def test_an_invalid_batch_request_is_rejected_at_once(
    world: World, fields: dict[str, Any], status: int, code: str | None, param: str
) -> None:
    order = {"input_file_id": uploaded(world.client, b"x").id, "endpoint": CHAT, "completion_window": "24h"}
    reply = world.api.post("/v1/batches", json=order | fields)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


def test_an_output_file_is_rejected_as_input(world: World) -> None:
    batch = a_batch(world.client, [GOOD], output_expires_after={"anchor": "created_at", "seconds": 3600})
    world.work()
    world.answer(*world.claim())
    world.work()
    output = checked(world.client.files.retrieve(world.read(batch.id).output_file_id))
    assert output.expires_at == output.created_at + 3600
    with pytest.raises(openai.BadRequestError):
        world.client.batches.create(input_file_id=output.id, endpoint=CHAT, completion_window="24h")


def test_the_openapi_examples_keep_null_fields(world: World) -> None:
    document = openapi_document()
    paths, schemas = document["paths"], document["components"]["schemas"]
    reply = a_batch(world.client, [GOOD]).to_dict()
    assert schemas["BatchReply"]["example"].keys() == reply.keys()
    Batch.model_validate(schemas["BatchReply"]["example"])
    file = world.client.files.retrieve(str(reply["input_file_id"])).to_dict()
    assert schemas["FileReply"]["example"].keys() == file.keys()
    FileObject.model_validate(schemas["FileReply"]["example"])
    order = paths["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert world.api.post("/v1/batches", json=order | {"input_file_id": file["id"]}).status_code == 200
    assert "multipart/form-data" in paths["/v1/files"]["post"]["requestBody"]["content"]
