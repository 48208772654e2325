"""The client for asyncio, and the one implementation of all calls."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from typing import IO, TYPE_CHECKING, Any, Final, Literal, Self, Unpack

import httpx

from jobs.client.connection import AsyncConnection, Connection, ErrorResponse, FileContent
from jobs.client.event_filter import EventFilter
from jobs.client.parameters import JobChanges, Parameters
from jobs.client.progress_bar import ProgressCallback, progress_reporter
from jobs.client.request_body import ALL_COLUMNS, Prompts, build_body
from jobs.client.response_format import ResponseFormat, adapter_of, response_format
from jobs.client.results import (
    JobCheck,
    JobEstimate,
    JobInfo,
    Output,
    Statistics,
    Verification,
    output_rows,
    to_dataframe,
)
from jobs.client.retries import RETRIED_STATUS_CODES, Backoff, ServiceBusy
from jobs.client.service_errors import error_of
from jobs.client.service_location import default_api_key, default_api_url
from jobs.client.uploads import PARTED_BYTES, ResumedUpload
from jobs.errors import BasicError, PilotRunning, ServiceUnavailable
from jobs.messages import Endpoint, JobStatus, PartialEvent, Priority
from jobs.settings import JobsSettings
from jobs.tables.columns import Columns

if TYPE_CHECKING:
    from pandas import DataFrame

# Counts the prompt tokens of JSON lines, given the parameters of the job and its check; None: no tokenizer is at hand.
CountPrompts = Callable[[IO[bytes], Mapping[str, Any], JobCheck], JobCheck | None]
Connect = Callable[[str, Mapping[str, str]], Connection]  # from the API URL and the headers of every request


class AsyncClient:
    """A connection to the service, for asyncio."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        patience_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Configure the client; it connects with the first call.

        While the service is down or busy, a call is retried with pauses of `patience_s` seconds in total.
        """
        self._set_up(api_url, api_key, patience_s, lambda url, headers: AsyncConnection(url, headers, transport))

    def _set_up(self, api_url: str | None, api_key: str | None, patience_s: float, connect: Connect) -> None:
        settings = JobsSettings()
        self.api_url = (api_url or default_api_url(settings)).rstrip("/")
        key = default_api_key(settings, self.api_url) if api_key is None else api_key
        self._patience_s = patience_s
        self._connection = connect(self.api_url, {"authorization": f"Bearer {key}"} if key else {})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._connection.close()

    async def submit(
        self,
        prompts: Prompts,
        *,
        model: str | None = None,
        endpoint: Endpoint | None = None,
        metadata: Mapping[str, str] | None = None,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        priority: Priority | Literal["high", "normal", "low"] | None = None,
        max_concurrent: int | None = None,
        completion_window: str | None = None,
        compare_plain: int | None = None,
        pilot: bool | int | Mapping[str, int] | None = None,
        budget: Mapping[str, float | None] | None = None,
        idempotency_key: str | None = None,
        columns: Columns = ALL_COLUMNS,
        **parameters: Unpack[Parameters],
    ) -> AsyncJob:
        """Submit a job.

        `prompts` is an iterable of strings or request objects, a data frame, table or dataset, or a file: its Path, its
        bytes, or a DataFile with a path or URL. A file holds JSON lines (prompts, request objects, or lines of an
        OpenAI batch file), plain text with one prompt per line, or a table (CSV, TSV, a JSON array, Parquet, Arrow),
        which is read and sent row by row. `columns` says which columns make the requests, and which ones the outputs
        return.

        `response_format` may be a class that pydantic knows, a JSON schema, or OpenAI's object; `parsed` of an output
        then returns its value. `parameters` apply to every request that does not set its own. Parameters that neither
        sets have the defaults of the API: temperature is 1 here, whereas `basic submit` has 0. After the job completes,
        `compare_plain` of its requests are decoded again with and without drafts, and the statistics of the job compare
        the times.

        With `pilot` (a number of requests, or True for a hundredth of them) these run first; then the job pauses, and
        `estimate` predicts the rest. With `budget`, an object with `tokens` or `seconds` or both, the job pauses when
        it has spent that.

        `name` and `labels` are what lists and searches find the job by; labels are stored as metadata. Waiting jobs of
        a higher `priority` run first. At most `max_concurrent` requests of the job run at once.

        A submission carries an idempotency key, so that a retry after a lost response creates no second job.
        """
        body = await self._connection.run_slow(lambda: build_body(prompts, columns))
        job = {
            "model": model,
            "endpoint": endpoint or body.endpoint,
            "metadata": metadata,
            "name": name,
            "labels": None if labels is None else dict(labels),
            "priority": priority,
            "max_concurrent": max_concurrent,
            "completion_window": completion_window,
            "compare_plain": compare_plain,
            "pilot": pilot,
            "budget": None if budget is None else dict(budget),
        }
        fields, settings = _given(job), _settings(parameters)
        if body.lines is not None:
            with body.lines as lines:
                reply = await self._submit_lines(lines, fields, settings, idempotency_key)
        else:
            content = fields | settings | {"requests": body.requests}
            reply = await self._call("POST", "/v1/jobs", json=content, headers=_key(idempotency_key))
        return AsyncJob(self, reply["id"], parameters.get("response_format"))

    async def check(
        self,
        prompts: Prompts,
        *,
        model: str | None = None,
        endpoint: Endpoint | None = None,
        columns: Columns = ALL_COLUMNS,
        count: CountPrompts | None = None,
        **parameters: Unpack[Parameters],
    ) -> JobCheck:
        """Check what `submit` would send, and store nothing: requests, tokens, and what would be refused.

        `count` counts the prompt tokens of a file with the model's tokenizer, if it is on this machine; without it
        they are estimated from bytes. Raises JobRefused for what refuses the job as a whole. A file may have as many
        bytes as the service takes in one body.
        """
        body = await self._connection.run_slow(lambda: build_body(prompts, columns))
        fields = _given({"model": model, "endpoint": endpoint or body.endpoint})
        settings = _settings(parameters)
        if body.lines is None:
            content = fields | settings | {"requests": body.requests}
            return JobCheck.model_validate(await self._call("POST", "/v1/jobs/check", json=content))
        with body.lines as lines:
            reply = await self._send_lines("/v1/jobs/check", lines, fields, settings, {})
            check = JobCheck.model_validate(reply)
            if count is None:
                return check
            lines.seek(0)
            return await self._connection.run_slow(lambda: count(lines, settings, check) or check)

    async def _submit_lines(
        self, lines: IO[bytes], fields: dict[str, Any], settings: dict[str, Any], idempotency_key: str | None
    ) -> dict[str, Any]:
        """Submit the lines of a file: a large one is uploaded in parts before, and continues after an interruption."""
        if lines.seek(0, os.SEEK_END) < PARTED_BYTES:
            return await self._send_lines("/v1/jobs", lines, fields, settings, _key(idempotency_key))
        upload = await self._connection.run_slow(lambda: ResumedUpload(self._call, self.api_url, lines))
        content = fields | settings | {"input_file_id": await upload.run()}
        headers = _key(idempotency_key or upload.state.idempotency_key)
        reply = await self._call("POST", "/v1/jobs", json=content, headers=headers)
        upload.forget()
        await self._call("DELETE", f"/v1/files/{content['input_file_id']}")  # the job has its lines
        return reply

    async def _send_lines(
        self,
        path: str,
        lines: IO[bytes],
        fields: Mapping[str, Any],
        settings: Mapping[str, Any],
        headers: dict[str, str],
    ) -> dict[str, Any]:
        """Post the lines of a file, with the fields of the job in the query."""
        head, query = _parameter_line(settings)
        arguments = {"file": FileContent(head, lines), "params": _query(fields) | query}
        return await self._call("POST", path, **arguments, headers=headers | {"content-type": "application/x-ndjson"})

    def job(self, job_id: str, response_format: ResponseFormat | None = None) -> AsyncJob:
        """Return the handle of a job that was submitted before. Sends nothing.

        `parsed` of its outputs then returns values of the type `response_format`.
        """
        return AsyncJob(self, job_id, response_format)

    async def jobs(
        self,
        limit: int = 20,
        after: str | None = None,
        *,
        mine: bool = False,
        id_prefix: str = "",
        labels: Mapping[str, str | None] | None = None,
        status: Collection[JobStatus | str] = (),
        name: str | None = None,
        model: str | None = None,
        search: str = "",
    ) -> list[JobInfo]:
        """List jobs, newest first, that meet all conditions.

        `mine`: only jobs of this API key, even if the key may read all. `labels`: with these labels; None is any value.
        `status`: with one of these. `search`: with this text in the name or a label, in any case.
        """
        params: dict[str, Any] = {
            "limit": limit,
            "after": after,
            "mine": mine or None,
            "id_prefix": id_prefix or None,
            "label": [key if value is None else f"{key}={value}" for key, value in (labels or {}).items()],
            "status": [status] if isinstance(status, str) else [str(one) for one in status],
            "name": name,
            "model": model,
            "search": search or None,
        }
        given = {name: value for name, value in params.items() if value not in (None, [])}
        reply = await self._call("GET", "/v1/jobs", params=given)
        listed = [JobInfo.model_validate(job) for job in reply["data"]]
        return [job for job in listed if job.id.startswith(id_prefix)]  # an older server ignores `id_prefix`

    async def stats(self) -> Statistics:
        """Return speed and speculation statistics of all jobs together."""
        return await self._call("GET", "/v1/stats")

    async def job_rows(self, job_id: str | None = None, limit: int = 100) -> list[Statistics]:
        """Return the statistics of one job, or of the newest jobs, as one flat row per job."""
        params = {"limit": limit} if job_id is None else {"job": job_id}
        return list((await self._call("GET", "/v1/stats/jobs", params=params))["data"])

    async def get(self, job_id: str) -> JobInfo:
        """Return the status, counts and progress of a job."""
        return JobInfo.model_validate(await self._call("GET", f"/v1/jobs/{job_id}"))

    async def estimate(self, job_id: str, poll_s: float = 1.0) -> JobEstimate:
        """Wait until the pilot of a job has ended, and return what it predicts. Raises NoPilot without one."""
        while True:
            try:
                return JobEstimate.model_validate(await self._call("GET", f"/v1/jobs/{job_id}/estimate"))
            except PilotRunning:
                await self._connection.sleep(poll_s)

    async def cancel(self, job_id: str) -> JobInfo:
        """Cancel a job. Outputs of completed requests are kept."""
        return JobInfo.model_validate(await self._call("POST", f"/v1/jobs/{job_id}/cancel"))

    async def delete(self, job_id: str, *, cancel: bool = False) -> None:
        """Erase a job that has ended: prompts, outputs, steps and its files. `cancel`: one that still runs, too."""
        await self._call("DELETE", f"/v1/jobs/{job_id}", params={"cancel": cancel})

    async def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Call a route that has no method here, such as those of webhooks, and return its JSON.

        `arguments` are those of an httpx request, such as `json` and `params`. Retried like all calls while the service
        is busy.
        """
        return await self._call(method, path, **arguments)

    async def pause(self, job_id: str) -> JobInfo:
        """Pause a job: its running requests return to the queue with their text so far. May be repeated."""
        return JobInfo.model_validate(await self._call("POST", f"/v1/jobs/{job_id}/pause"))

    async def resume(self, job_id: str) -> JobInfo:
        """Resume a paused job; its texts are those without the pause. May be repeated."""
        return JobInfo.model_validate(await self._call("POST", f"/v1/jobs/{job_id}/resume"))

    async def change(self, job_id: str, **changes: Unpack[JobChanges]) -> JobInfo:
        """Change the name, labels, priority or concurrency limit of a job; None removes one. Other labels stay."""
        labels = changes.get("labels")
        content = {**changes, **({} if labels is None else {"labels": dict(labels)})}
        return JobInfo.model_validate(await self._call("PATCH", f"/v1/jobs/{job_id}", json=content))

    async def retry(self, job_id: str, *, idempotency_key: str | None = None) -> AsyncJob:
        """Submit the requests of an ended job that have no result as a new job, and return it."""
        reply = await self._call("POST", f"/v1/jobs/{job_id}/retry", headers=_key(idempotency_key))
        return AsyncJob(self, reply["id"])

    async def verify(self, job_id: str, sample: str | int = "1%") -> Verification:
        """Let the service compute a random sample of a job's outputs again: a share such as 1%, or a number."""
        body = {"sample": sample}
        reply = await self._call("POST", f"/v1/jobs/{job_id}/verifications", json=body, headers=_key(None))
        return Verification.model_validate(reply)

    async def verification(self, verification_id: str) -> Verification:
        """Return a verification: its progress, and its results when it has ended."""
        return Verification.model_validate(await self._call("GET", f"/v1/verifications/{verification_id}"))

    async def verification_report(self, verification_id: str) -> dict[str, Any]:
        """Return the signed report of an ended verification."""
        return await self._call("GET", f"/v1/verifications/{verification_id}/report")

    async def job_stats(self, job_id: str) -> Statistics:
        """Return speed and speculation statistics of a job."""
        return await self._call("GET", f"/v1/jobs/{job_id}/stats")

    async def wait(self, job_id: str, progress: ProgressCallback = False, poll_s: float = 1.0) -> JobInfo:
        """Wait until the job ends. `progress` is called with each JobInfo; True shows a progress bar."""
        with progress_reporter(progress) as report:
            while True:
                info = await self.get(job_id)
                report(info)
                if info.status.final:
                    return info
                await self._connection.sleep(poll_s)

    async def outputs(
        self,
        job_id: str,
        *,
        failed: bool = False,
        follow: bool = False,
        prompt: bool = False,
        cursor: str = "",
        response_format: ResponseFormat | None = None,
    ) -> AsyncGenerator[Output]:
        """Yield the outputs of a job so far, in the order of its requests. With `failed`: only those that failed.

        With `prompt`, outputs have their prompts too.

        With `follow`, yield outputs in the order in which requests end, until the job ends. After a lost connection
        the client reconnects and continues where it stopped. `cursor` is that of an output, to begin after it.
        `parsed` returns values of the type `response_format`.
        """
        position: dict[str, Any] = {"cursor": cursor} if follow else {"after": -1}
        adapter = adapter_of(response_format)
        backoff = self._backoff()
        while True:
            try:
                params = position | {"failed": failed, "follow": follow} | ({"prompt": True} if prompt else {})
                async with aclosing(self._lines(f"/v1/jobs/{job_id}/outputs", params)) as lines:
                    async for line in lines:
                        output = Output.model_validate_json(line).read_by(adapter)
                        position = {"cursor": output.cursor} if follow else {"after": output.index}
                        backoff = self._backoff()
                        yield output
                return
            except (httpx.TransportError, ServiceBusy) as exc:
                await backoff.pause_or_raise(*self._reason(exc))

    async def results(
        self, job_id: str, *, failed: bool = False, response_format: ResponseFormat | None = None
    ) -> list[dict[str, Any]]:
        """Return the outputs so far as dicts, one per choice; a failed request has one with its error.

        With `response_format` they have the key `parsed`: the value of the text, None if it can't be read.
        """
        parsed = response_format is not None
        async with aclosing(self.outputs(job_id, failed=failed, response_format=response_format)) as outputs:
            return [row async for output in outputs for row in output_rows(output, parsed)]

    async def dataframe(
        self, job_id: str, *, failed: bool = False, response_format: ResponseFormat | None = None
    ) -> DataFrame:
        """Return the rows of `results` as a pandas DataFrame."""
        return to_dataframe(await self.results(job_id, failed=failed, response_format=response_format))

    async def follow(self, job_id: str) -> AsyncGenerator[PartialEvent]:
        """Yield the events of a job as text is generated, until it ends. Reconnects after a lost connection."""
        event_filter = EventFilter()  # after a reconnect the service may send events again
        position = _LastEvent()
        backoff = self._backoff()
        while True:
            try:
                async with aclosing(self._events(job_id, position)) as events:
                    async for event in events:
                        backoff = self._backoff()
                        if event_filter.accept(event):
                            yield event
                        if event.status is not None and event.status.final:
                            return
                ended = ServiceUnavailable(f"{self.api_url} closed the stream before the job ended.")
                await backoff.pause_or_raise(ended)
            except (httpx.TransportError, ServiceBusy) as exc:
                await backoff.pause_or_raise(*self._reason(exc))

    async def _events(self, job_id: str, position: _LastEvent) -> AsyncGenerator[PartialEvent]:
        """Yield the events of one connection. Record the id of an event when the next one is asked for."""
        headers = {"last-event-id": position.id} if position.id else {}
        event_id: str | None = None
        async with aclosing(self._lines(f"/v1/jobs/{job_id}/events", {}, headers)) as lines:
            async for line in lines:
                if line.startswith("id:"):
                    event_id = line[3:].strip()
                elif line.startswith("data:"):
                    yield PartialEvent.model_validate_json(line[5:])
                    position.id = event_id or position.id
                    event_id = None

    async def _lines(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[str]:
        r"""Yield the lines of a response as they arrive. Only \n ends a line: JSON may contain U+2028."""
        rest = ""
        try:
            async with aclosing(self._connection.stream_text(path, params, headers or {})) as texts:
                async for text in texts:
                    *lines, rest = (rest + text).split("\n")
                    for line in lines:
                        yield line
        except ErrorResponse as error:
            response = error.response
            if response.status_code in RETRIED_STATUS_CODES:
                raise ServiceBusy(error_of(response), response.headers.get("retry-after")) from None
            raise error_of(response) from None

    async def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Return the JSON of the response or raise its error. Retry while the service is down or busy."""
        backoff = self._backoff()
        while True:
            try:
                response = await self._connection.send(method, path, **arguments)
            except httpx.TransportError as exc:
                await backoff.pause_or_raise(self._unavailable(exc))
                continue
            if response.is_success:
                return response.json()  # type: ignore[no-any-return]
            if response.status_code not in RETRIED_STATUS_CODES:
                raise error_of(response)
            await backoff.pause_or_raise(error_of(response), response.headers.get("retry-after"))

    def _backoff(self) -> Backoff:
        return Backoff(self._patience_s, self._connection.sleep)

    def _reason(self, exc: httpx.TransportError | ServiceBusy) -> tuple[BasicError, str | None]:
        """Return the error to raise when no time is left, and the `Retry-After` header."""
        return (exc.error, exc.retry_after) if isinstance(exc, ServiceBusy) else (self._unavailable(exc), None)

    def _unavailable(self, exc: httpx.TransportError) -> ServiceUnavailable:
        reason = str(exc) or type(exc).__name__
        return ServiceUnavailable(f"{self.api_url} does not answer: {reason}. Is bASIC running? `basic up` starts it.")


class _LastEvent:
    """The id of the last event that the caller has received."""

    id: str | None = None


class AsyncJob:
    """A job of an AsyncClient. Creating the handle sends nothing."""

    def __init__(self, client: AsyncClient, job_id: str, response_format: ResponseFormat | None = None) -> None:
        self._client = client
        self.id = job_id
        self.response_format = response_format

    async def info(self) -> JobInfo:
        """Return the job's status, counts and progress."""
        return await self._client.get(self.id)

    async def wait(self, progress: ProgressCallback = False, poll_s: float = 1.0) -> JobInfo:
        """Wait until the job ends; `progress=True` shows a progress bar."""
        return await self._client.wait(self.id, progress, poll_s)

    def follow(self) -> AsyncGenerator[PartialEvent]:
        """Yield events as text is generated, until the job ends."""
        return self._client.follow(self.id)

    def outputs(
        self, *, failed: bool = False, follow: bool = False, prompt: bool = False, cursor: str = ""
    ) -> AsyncGenerator[Output]:
        """Yield the outputs so far, in the order of the requests; with `follow` all, as requests end."""
        return self._client.outputs(
            self.id,
            failed=failed,
            follow=follow,
            prompt=prompt,
            cursor=cursor,
            response_format=self.response_format,
        )

    async def results(self, *, failed: bool = False) -> list[dict[str, Any]]:
        """Return the outputs so far as dicts."""
        return await self._client.results(self.id, failed=failed, response_format=self.response_format)

    async def dataframe(self, *, failed: bool = False) -> DataFrame:
        """Return the outputs so far as a pandas DataFrame."""
        return await self._client.dataframe(self.id, failed=failed, response_format=self.response_format)

    async def estimate(self) -> JobEstimate:
        """Wait until the pilot has ended, and return what it predicts."""
        return await self._client.estimate(self.id)

    async def cancel(self) -> JobInfo:
        """Cancel the job. Outputs of completed requests are kept."""
        return await self._client.cancel(self.id)

    async def delete(self, *, cancel: bool = False) -> None:
        """Erase the job, which has ended: prompts, outputs, steps and its files. `cancel`: cancel it first."""
        await self._client.delete(self.id, cancel=cancel)

    async def pause(self) -> JobInfo:
        """Pause the job: its running requests return to the queue with their text so far."""
        return await self._client.pause(self.id)

    async def resume(self) -> JobInfo:
        """Resume the job; its texts are those without the pause."""
        return await self._client.resume(self.id)

    async def change(self, **changes: Unpack[JobChanges]) -> JobInfo:
        """Change the name, labels, priority or concurrency limit; None removes one. Other labels stay."""
        return await self._client.change(self.id, **changes)

    async def retry(self, *, idempotency_key: str | None = None) -> AsyncJob:
        """Submit the requests without a result as a new job, and return it."""
        again = await self._client.retry(self.id, idempotency_key=idempotency_key)
        return AsyncJob(self._client, again.id, self.response_format)

    async def stats(self) -> Statistics:
        """Return speed and speculation statistics of the job."""
        return await self._client.job_stats(self.id)


def _key(idempotency_key: str | None) -> dict[str, str]:
    return {"idempotency-key": idempotency_key or str(uuid.uuid4())}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling parameters of a job as JSON values."""
    form = parameters.get("response_format")
    return _given(parameters) | ({} if form is None else {"response_format": response_format(form)})


def _query(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}


_MAX_QUERY_CHARS: Final = 2_000  # of the parameters of a job; longer ones precede the lines


def _parameter_line(parameters: Mapping[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Return the line before the others, and the query, that hold the parameters of a job: long ones in the line."""
    query = _query(parameters)
    if sum(map(len, query.values())) <= _MAX_QUERY_CHARS:
        return b"", query
    return json.dumps({"parameters": parameters}).encode() + b"\n", {}
