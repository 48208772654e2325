"""Faults: an error of one request ends that request only, and a slow prompt delays no other request."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from torch import Tensor

from jobs.errors import InvalidValue
from storage import writes
from storage.models import JobRow, Request
from storage.records import Claim, FlushResult, Lease, RequestProgress
from storage.session import Database
from tests.models import byte_tokenizer
from tests.unit.worker.serving.test_runner import AT_END, Worker, submit, texts, words
from worker.serving import engine_loop
from worker.serving.requests import request_reader
from worker.serving.requests.active_request import ActiveChoice
from worker.serving.requests.request_reader import RequestReader
from worker.serving.requests.sink import Sink
from worker.text.codec import Codec
from worker.text.output_stream import OutputStream

BAD = 1  # the index of the request that fails


class Panic(BaseException):
    """A panic of compiled code, which is not an Exception."""


def of_prompt(_codec: Codec, request: Any, *_: Any) -> bool:
    return bool(request.prompt == "bad")


def of_key(_codec: Codec, key: tuple[Any, ...], *_: Any) -> bool:
    return bool(key[1] == BAD)


def of_output_stream(stream: OutputStream, *_: Any) -> bool:
    return of_key(None, stream.key)  # type: ignore[arg-type]


def of_choice(choice: ActiveChoice, *_: Any) -> bool:
    return of_output_stream(choice.output_stream)


def of_live(_sink: Sink, request: Any, *_: Any) -> bool:
    return bool(request.claim.lease.request_index == BAD)


PLACES: list[tuple[type, str, Callable[..., bool]]] = [
    (Codec, "encode_all", of_prompt),
    (Codec, "sequence", of_key),
    (OutputStream, "take", of_output_stream),
    (ActiveChoice, "take", of_choice),
    (ActiveChoice, "output", of_choice),
    (ActiveChoice, "checkpoint", of_choice),
    (Sink, "started", of_live),
]


def statuses(database: Database) -> dict[int, tuple[str, str | None]]:
    with database.read() as session:
        return {r.request_index: (r.status, r.error_code) for r in session.scalars(select(Request))}


@pytest.mark.parametrize(
    "error", [TypeError("no \udcff \0 such thing"), RecursionError(), Panic("index out of bounds")]
)
@pytest.mark.parametrize(("owner", "name", "is_bad"), PLACES, ids=[f"{o.__name__}.{n}" for o, n, _ in PLACES])
def test_any_exception_for_one_request_ends_that_request_alone(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    is_bad: Callable[..., bool],
    error: BaseException,
) -> None:
    if isinstance(error, Panic) and name in ("output", "checkpoint"):
        pytest.skip("no compiled code is called there")
    real = getattr(owner, name)

    def broken(self: Any, *arguments: Any, **named: Any) -> Any:
        if is_bad(self, *arguments):
            raise error
        return real(self, *arguments, **named)

    monkeypatch.setattr(owner, name, broken)
    submit(database, "one", "bad", "three", n=2, logprobs=1, record_trees=2, max_tokens=4)
    worker = Worker(database, "a", max_sequences=6)
    worker.run()
    assert statuses(database) == {
        0: ("completed", None),
        1: ("failed", "server_error"),
        2: ("completed", None),
    }
    with database.read() as session:
        assert session.scalars(select(JobRow)).one().status == "completed"
        (failed,) = session.scalars(select(Request).where(Request.request_index == BAD))
        assert type(error).__name__ in (failed.error_message or "")
        assert failed.error_status_code == 500
    assert [e.type for e in worker.events if e.index == BAD][-1] == "failed"
    assert set(texts(database)) == {(index, choice) for index in (0, 2) for choice in range(2)}


def test_nan_logits_of_one_request_are_that_requests_error(database: Database) -> None:
    def law(prefix: tuple[int, ...]) -> Tensor:
        return torch.full((258,), torch.nan) if ord("!") in prefix and len(prefix) > 10 else words(prefix)

    submit(database, "one", "two!", "three", temperature=1.0)
    Worker(database, "a", law, interval_s=AT_END).run()
    assert statuses(database) == {0: ("completed", None), 1: ("failed", "engine_error"), 2: ("completed", None)}


def test_a_value_that_the_database_rejects_fails_its_request_and_the_others_are_written(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writes.flush

    def choosy(
        session: Session,
        owner: str,
        lease_s: float,
        progress: list[RequestProgress],
        held: list[Lease],
        numerics: str | None,
    ) -> FlushResult:
        result = real(session, owner, lease_s, progress, held, numerics)
        if any(entry.lease.request_index == BAD and entry.checkpoints for entry in progress):
            raise ValueError("a value is refused")  # the transaction is rolled back
        return result

    monkeypatch.setattr(writes, "flush", choosy)
    submit(database, "one", "two", "three")
    worker = Worker(database, "a")
    worker.run()
    assert statuses(database) == {0: ("completed", None), 1: ("failed", "server_error"), 2: ("completed", None)}
    for index in (0, 2):
        assert "".join(e.text for e in worker.events if e.index == index) == texts(database)[index, 0]


def test_a_database_that_rejects_everything_fails_no_request(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> FlushResult:
        raise ValueError("nothing can be written")

    submit(database, "one", "two")
    monkeypatch.setattr(writes, "flush", broken)
    with pytest.raises(ValueError, match="nothing can be written"):
        Worker(database, "a", interval_s=AT_END).run()


def test_an_event_that_cannot_be_published_stops_no_other_request(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such event")

    submit(database, "one")
    monkeypatch.setattr(Sink, "_tokens", broken)
    Worker(database, "a", interval_s=AT_END).run()
    assert statuses(database) == {0: ("completed", None)}


def test_an_error_message_may_contain_any_text(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise InvalidValue("no \ud800 half, no \0", param="a\ud800")

    monkeypatch.setattr(Codec, "encode_all", refuse)
    submit(database, "one")
    Worker(database, "a", interval_s=AT_END).run()
    with database.read() as session:
        failed = session.scalars(select(Request)).one()
        assert (failed.error_message, failed.error_param) == ("no \ufffd half, no \ufffd", "a\ufffd")


def test_other_requests_are_decoded_and_leases_renewed_while_a_prompt_is_tokenized(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), Codec.encode_all

    def slow(codec: Codec, request: Any, endpoint: str) -> Any:
        if request.prompt != "short":
            go_on.wait()
        return real(codec, request, endpoint)

    monkeypatch.setattr(Codec, "encode_all", slow)
    monkeypatch.setattr(engine_loop, "_REPORT_S", 0.0)
    submit(database, "x" * 50_000, "y" * 40_000, job_id="batch")
    submit(database, "short", job_id="chat", priority=1)
    worker = Worker(database, "a")
    for _ in range(200):
        worker.runner.run_once(notified=worker.work_waits())
        if (0, 0) in texts(database):
            break
    assert (0, 0) in texts(database), "the short request waited for the long ones"
    with database.write() as session:
        session.execute(text("UPDATE requests SET lease_expires_at = 1 WHERE status = 'running'"))
    worker.runner.run_once()
    with database.read() as session:
        running = list(session.scalars(select(Request).where(Request.status == "running")))
    assert len(running) == 2
    assert all((r.lease_expires_at or 0) > 1 for r in running)
    assert worker.runner.busy
    go_on.set()
    worker.run()
    with database.read() as session:
        codes = set(session.scalars(select(Request.error_code).where(Request.job_id == "batch")))
    assert codes == {"context_length_exceeded"}


def test_prompts_that_are_slow_to_tokenize_block_no_slot(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, real = threading.Event(), Codec.encode_all

    def slow(codec: Codec, request: Any, endpoint: str) -> Any:
        if request.prompt != "short":
            go_on.wait()
        return real(codec, request, endpoint)

    monkeypatch.setattr(Codec, "encode_all", slow)
    submit(database, *["x" * 50_000] * 3, job_id="batch")
    worker = Worker(database, "a")
    worker.runner.run_once(notified=True)
    submit(database, "short", job_id="later")
    for _ in range(200):
        worker.runner.run_once(notified=worker.work_waits())
        if texts(database):
            break
    assert texts(database), "three long prompts filled an engine of three places"
    go_on.set()
    worker.run()


def test_a_stopping_worker_releases_the_requests_that_it_tokenizes(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), Codec.encode_all

    def slow(*arguments: Any) -> Any:
        go_on.wait()
        return real(*arguments)

    monkeypatch.setattr(request_reader, "_SHORT_CHARS", -1)
    monkeypatch.setattr(request_reader, "_CLOSE_S", 0.0)
    monkeypatch.setattr(Codec, "encode_all", slow)
    submit(database, "one")
    leaving = Worker(database, "a")
    leaving.runner.run_once(notified=True)
    leaving.runner.hand_back()
    assert statuses(database) == {0: ("queued", None)}
    go_on.set()
    Worker(database, "b", interval_s=AT_END).run()
    assert statuses(database) == {0: ("completed", None)}


def a_claim(index: int, prompt: str) -> Claim:
    body = {"model": "m", "prompt": prompt, "sampling": {"seed": 1}}
    return Claim(Lease("job", index, 1), f"r{index}", "/v1/completions", 0, body, 1, None, (), ())


def read_all(reading: RequestReader, count: int) -> list[tuple[int, Any]]:
    found: list[tuple[int, Any]] = []
    while len(found) < count:
        found += [(claim.lease.request_index, result) for claim, result in reading.take(0.02, 0.02)]
    return found


def test_the_longest_request_is_read_last_but_not_after_all_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def noted(_codec: Codec, request: Any, _endpoint: str) -> list[list[int]]:
        begun.set()
        go_on.wait()
        order.append(len(request.prompt) // 1000)
        return [[1]]

    monkeypatch.setattr(Codec, "encode_all", noted)
    reading = RequestReader(Codec(byte_tokenizer(), frozenset(), 100, 258))
    sizes = [30, 900, 200, 50, 60, *[40] * 60]
    for index, size in enumerate(sizes):
        reading.put(a_claim(index, "x" * (1000 * size)))
        begun.wait()
    go_on.set()
    read_all(reading, len(sizes))
    assert order[:3] == [30, 50, 60]
    assert 200 in order[4:14]
    assert 900 in order[40:-5], "it waits for many, and not for ever"


def test_endless_tokenization_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(_codec: Codec, request: Any, _endpoint: str) -> list[list[int]]:
        while request.prompt == "endless":
            pass
        return [[1]]

    monkeypatch.setattr(Codec, "encode_all", endless)
    monkeypatch.setattr(request_reader, "_MAX_READ_S", 0.02)
    reading = RequestReader(Codec(byte_tokenizer(), frozenset(), 100, 258))
    reading.put(a_claim(0, "endless"))
    reading.put(a_claim(1, "fine"))
    results = dict(read_all(reading, 2))
    assert isinstance(results[0], InvalidValue)
    assert results[1].prompts == [[1]]
