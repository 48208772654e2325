from __future__ import annotations

import asyncio
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs import AsyncClient, Client
from jobs.client import retries
from jobs.client.results import Output
from jobs.errors import (
    BodyTooLarge,
    IdempotencyConflict,
    JobRefused,
    NotCancellable,
    NotFound,
    ServiceUnavailable,
    SetupError,
    UnknownModel,
    UnknownParameter,
)
from jobs.messages import JobStatus, PartialEvent

Answer = Callable[[httpx.Request], httpx.Response]

JOB = {
    "id": "batch_1",
    "object": "job",
    "status": "in_progress",
    "model": "tiny",
    "endpoint": "/v1/chat/completions",
    "created_at": 1,
    "request_counts": {"total": 2, "completed": 0, "failed": 0},
    "progress": {"completion_tokens": 0},
    "a_field_of_tomorrow": True,
}


class Service:
    """Returns the test's replies in order, and records the calls."""

    def __init__(self, *answers: Answer | httpx.Response | Exception) -> None:
        self._answers = iter(answers)
        self.calls: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_FIRST_PAUSE_S", 0.005)


def some_client(service: Service, patience_s: float = 5.0) -> Client:
    return Client("http://service", patience_s=patience_s, transport=httpx.MockTransport(service))


def a_job(**changes: Any) -> httpx.Response:
    return httpx.Response(200, json=JOB | changes)


def an_error(status: int, code: str | None = None, message: str = "No.", param: str | None = None) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": "x", "param": param, "code": code}})


def a_stream(*events: PartialEvent) -> httpx.Response:
    lines = [
        f"id: 7.0.0.{event.seq}\nevent: {event.type}\n"
        f"data: {json.dumps(event.model_dump(mode='json', exclude_none=True) | {'a_field_of_tomorrow': True})}\n\n"
        for event in events
    ]
    return httpx.Response(200, text=": ping\n\n" + "".join(lines))


def tokens(seq: int, text: str, snapshot: bool = False) -> PartialEvent:
    return PartialEvent(job_id="batch_1", request="a", index=0, type="tokens", seq=seq, text=text, snapshot=snapshot)


def ended(status: JobStatus = JobStatus.COMPLETED) -> PartialEvent:
    return PartialEvent(job_id="batch_1", type="job", status=status)


def test_prompts_are_submitted_in_one_object_with_the_parameters_of_the_job() -> None:
    service = Service(a_job())
    with some_client(service) as client:
        assert client.submit(["Hello", {"prompt": "Bye", "n": 2}], max_tokens=5, model="tiny").id == "batch_1"
    assert json.loads(service.calls[0].content) == {
        "model": "tiny",
        "max_tokens": 5,
        "requests": ["Hello", {"prompt": "Bye", "n": 2}],
    }


def test_one_string_is_one_prompt() -> None:
    service = Service(a_job())
    with some_client(service) as client:
        client.submit("Hello")
    assert json.loads(service.calls[0].content)["requests"] == ["Hello"]


def test_a_file_is_submitted_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'"Hello"\n{broken\n')
    service = Service(a_job())
    with some_client(service) as client:
        client.submit(path, max_tokens=5, metadata={"team": "a"}, compare_plain=20)
    [call] = service.calls
    assert call.content == path.read_bytes()
    assert call.headers["content-type"] == "application/x-ndjson"
    assert dict(call.url.params) == {"max_tokens": "5", "metadata": '{"team": "a"}', "compare_plain": "20"}


def test_a_submission_is_retried_with_the_same_idempotency_key() -> None:
    service = Service(httpx.ReadError("reset"), an_error(503), a_job())
    with some_client(service) as client:
        client.submit("Hello")
    assert len({call.headers["idempotency-key"] for call in service.calls}) == 1
    assert len(service.calls) == 3


def test_an_unreachable_service_raises_an_error_with_advice() -> None:
    service = Service(*[httpx.ConnectError("refused")] * 3)
    with some_client(service, patience_s=0.0) as client, pytest.raises(ServiceUnavailable, match="basic up"):
        client.jobs()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (an_error(404), NotFound),
        (an_error(404, "model_not_found"), UnknownModel),
        (an_error(400, "unknown_parameter"), UnknownParameter),
        (an_error(409), NotCancellable),
        (an_error(409, "idempotency_conflict"), IdempotencyConflict),
        (an_error(413, "file_too_large"), BodyTooLarge),
        (httpx.Response(418, text="<html>teapot</html>"), JobRefused),
    ],
)
def test_an_error_response_is_raised_as_the_class_of_its_code(answer: httpx.Response, kind: type[Exception]) -> None:
    with some_client(Service(answer)) as client, pytest.raises(kind):
        client.submit("Hello")


def test_an_error_keeps_message_and_field() -> None:
    answer = an_error(400, "invalid_value", "must be at least 1", "max_tokens")
    with some_client(Service(answer)) as client, pytest.raises(Exception, match="max_tokens: must be at least 1"):
        client.submit("Hello")


def test_wait_returns_when_the_job_ends_and_reports_progress() -> None:
    seen: list[int] = []
    counts = [{"total": 2, "completed": done, "failed": 0} for done in (0, 1, 2)]
    statuses = ["in_progress", "finalizing", "completed"]
    answers = [a_job(request_counts=count, status=status) for count, status in zip(counts, statuses, strict=True)]
    with some_client(Service(*answers)) as client:
        info = client.job("batch_1").wait(lambda now: seen.append(now.request_counts.ended), poll_s=0)
    assert (info.status, seen) == (JobStatus.COMPLETED, [0, 1, 2])


def test_follow_ends_with_the_job() -> None:
    with some_client(Service(a_stream(tokens(0, "Hel"), tokens(1, "lo"), ended()))) as client:
        events = list(client.job("batch_1").follow())
    assert [event.text for event in events] == ["Hel", "lo", ""]


def test_follow_reconnects_and_yields_no_event_twice() -> None:
    first = a_stream(tokens(0, "Hel"), tokens(1, "lo"))
    second = a_stream(tokens(1, "Hello", snapshot=True), tokens(2, "!"), ended())
    with some_client(Service(first, second)) as client:
        events = list(client.job("batch_1").follow())
    assert [event.text for event in events] == ["Hel", "lo", "!", ""]


def test_follow_reconnects_with_the_id_of_the_last_event() -> None:
    service = Service(a_stream(tokens(0, "Hel"), tokens(1, "lo")), an_error(503), a_stream(tokens(2, "!"), ended()))
    with some_client(service) as client:
        events = list(client.job("batch_1").follow())
    assert [event.text for event in events] == ["Hel", "lo", "!", ""]
    assert [call.headers.get("last-event-id") for call in service.calls] == [None, "7.0.0.1", "7.0.0.1"]


def test_leaving_a_stream_early_leaves_the_client_usable() -> None:
    service = Service(a_stream(tokens(0, "Hel"), tokens(1, "lo"), ended()), a_job())
    with some_client(service) as client:
        for _ in client.job("batch_1").follow():
            break
        assert client.job("batch_1").info().id == "batch_1"


def test_only_newlines_separate_outputs() -> None:
    choice = {"index": 0, "text": "a\u2028b\n", "finish_reason": "stop", "completion_tokens": 3}
    good = {"custom_id": "a", "index": 0, "status": "completed", "choices": [choice], "usage": {}}
    bad = {"custom_id": "b", "index": 1, "status": "failed", "error": {"message": "No.", "code": None}}
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (good, bad))
    with some_client(Service(httpx.Response(200, text=body))) as client:
        first, second = client.job("batch_1").outputs()
    assert first.text == "a\u2028b\n"
    assert second.error is not None
    assert second.error.message == "No."


class _Breaking(httpx.SyncByteStream):
    """A body that breaks off after its first part."""

    def __init__(self, part: bytes) -> None:
        self._part = part

    def __iter__(self) -> Iterator[bytes]:
        yield self._part
        raise httpx.ReadError("reset")


def test_outputs_continue_after_the_last_whole_line() -> None:
    lines = [json.dumps({"custom_id": str(n), "index": n, "status": "completed"}) + "\n" for n in range(2)]
    broken = httpx.Response(200, stream=_Breaking((lines[0] + lines[1][:5]).encode()))
    service = Service(broken, httpx.Response(200, text=lines[1]))
    with some_client(service) as client:
        assert [output.index for output in client.job("batch_1").outputs()] == [0, 1]
    assert service.calls[1].url.params["after"] == "0"


def test_followed_outputs_continue_after_the_last_cursor() -> None:
    lines = [json.dumps({"custom_id": str(n), "index": n, "status": "completed", "cursor": f"{n}.{n}"}) for n in (2, 0)]
    broken = httpx.Response(200, stream=_Breaking((lines[0] + "\n").encode()))
    service = Service(broken, httpx.Response(200, text=lines[1] + "\n"))
    with some_client(service) as client:
        assert [output.index for output in client.job("batch_1").outputs(follow=True)] == [2, 0]
    assert [dict(call.url.params)["cursor"] for call in service.calls] == ["", "2.2"]


def answers() -> httpx.Response:
    choices = [{"index": n, "text": f"t{n}", "finish_reason": "stop", "completion_tokens": 3} for n in (0, 1)]
    good = {"custom_id": "a", "index": 0, "status": "completed", "choices": choices}
    bad = {"custom_id": "b", "index": 1, "status": "failed", "error": {"message": "No.", "code": None}}
    return httpx.Response(200, text="".join(json.dumps(line) + "\n" for line in (good, bad)))


def test_results_have_one_row_per_choice_and_one_per_failed_request() -> None:
    with some_client(Service(answers())) as client:
        rows = client.job("batch_1").results()
    assert [(row["custom_id"], row["choice"], row["text"], row["error"]) for row in rows] == [
        ("a", 0, "t0", None),
        ("a", 1, "t1", None),
        ("b", 0, None, "No."),
    ]


@pytest.mark.parametrize(
    ("sent", "answer"),
    [({}, "raw"), ({"content": "4", "reasoning_content": "I add."}, "4"), ({"content": None}, "")],
)
def test_an_answer_is_the_content_where_the_service_sends_it(sent: dict[str, Any], answer: str) -> None:
    choice = {"index": 0, "text": "raw", "finish_reason": "stop", "completion_tokens": 3} | sent
    output = Output.model_validate({"custom_id": "a", "index": 0, "status": "completed", "choices": [choice]})
    assert (output.answer, output.choices[0].answer, output.text) == (answer, answer, "raw")


def test_results_are_a_data_frame_too() -> None:
    with some_client(Service(answers())) as client:
        frame = client.job("batch_1").dataframe()
    assert list(frame["text"].dropna()) == ["t0", "t1"]


def test_without_pandas_dataframe_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with some_client(Service(answers())) as client, pytest.raises(SetupError, match=r"basic-batch\[pandas\]"):
        client.job("batch_1").dataframe()


def test_retry_creates_one_new_job() -> None:
    service = Service(httpx.ReadError("reset"), a_job(id="batch_2", retry_of="batch_1"))
    with some_client(service) as client:
        assert client.job("batch_1").retry().id == "batch_2"
    assert len({call.headers["idempotency-key"] for call in service.calls}) == 1


def test_the_asynchronous_client_does_the_same() -> None:
    async def scenario() -> tuple[str, list[str]]:
        stream = a_stream(tokens(0, "Hello"), ended())
        transport = httpx.MockTransport(Service(a_job(), stream))
        async with AsyncClient("http://service", transport=transport) as client:
            job = await client.submit("Hi")
            return job.id, [event.text async for event in job.follow()]

    assert asyncio.run(scenario()) == ("batch_1", ["Hello", ""])


def test_progress_is_printed_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = {"completion_tokens": 1200, "tokens_per_s": 60.0, "time_left_s": 95.0}
    counts = {"total": 2, "completed": 1, "failed": 0}
    service = Service(a_job(request_counts=counts, progress=progress), a_job(status="completed"))
    with some_client(service) as client:
        client.job("batch_1").wait(progress=True, poll_s=0)
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0] == "1/2 requests · 1,200 tokens · 60.0 tokens/s · about 1 min 35 s left"
    assert captured.out == ""


def test_the_key_is_sent_with_every_call() -> None:
    service = Service(a_job())
    with Client("http://service", "secret", transport=httpx.MockTransport(service)) as client:
        client.job("batch_1").info()
    assert service.calls[0].headers["authorization"] == "Bearer secret"


class _Endless(httpx.SyncByteStream):
    """A stream on which nothing happens after its first part."""

    def __init__(self, first: bytes = b": ping\n\n") -> None:
        self._first = first
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield self._first
        threading.Event().wait()

    def close(self) -> None:
        self.closed = True


def test_ctrl_c_ends_an_idle_stream() -> None:
    stream = _Endless()
    main = threading.main_thread().ident
    assert main is not None
    with some_client(Service(httpx.Response(200, stream=stream), a_job())) as client:
        interrupt = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            list(client.job("batch_1").follow())
        interrupt.join()
        assert stream.closed
        assert client.job("batch_1").info().id == "batch_1"


def test_leaving_the_loop_closes_the_stream() -> None:
    line = json.dumps({"custom_id": "a", "index": 0, "status": "completed"})
    stream = _Endless(f"{line}\n".encode())
    with some_client(Service(httpx.Response(200, stream=stream))) as client:
        outputs = client.job("batch_1").outputs()
        assert next(outputs).custom_id == "a"
        assert not stream.closed
        del outputs
        assert stream.closed


def test_a_client_starts_no_thread_and_may_be_shared_by_threads() -> None:
    before = threading.active_count()
    with some_client(Service(*[a_job()] * 8)) as client:
        assert client.job("batch_1").info().id == "batch_1"
        assert threading.active_count() == before
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda _: client.job("batch_1").info().id, range(7)))
    assert found == ["batch_1"] * 7


def test_a_client_works_where_an_event_loop_runs() -> None:
    async def in_a_notebook() -> list[str]:
        with some_client(Service(a_stream(tokens(0, "Hel"), tokens(1, "lo"), ended()), a_job())) as client:
            events = client.job("batch_1").follow()
            return [next(events).text, client.job("batch_1").info().id]

    assert asyncio.run(in_a_notebook()) == ["Hel", "batch_1"]


def test_an_iterator_of_prompts_is_read_in_the_callers_thread() -> None:
    threads: list[int] = []

    def prompts() -> Iterator[str]:
        threads.append(threading.get_ident())
        yield "Hello"

    with some_client(Service(a_job())) as client:
        client.submit(prompts())
    assert threads == [threading.get_ident()]


def test_a_call_that_needs_an_event_loop_is_refused() -> None:
    with some_client(Service()) as client, pytest.raises(RuntimeError, match="AsyncClient"):
        client.run(lambda _: asyncio.sleep(0))
