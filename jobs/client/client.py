"""The Python client: submit prompts, follow the text, fetch the outputs. Needs httpx and pydantic, no server code.

    with Client() as client:
        job = client.submit(["What is the capital of France?"], max_tokens=20, temperature=0)
        job.wait(progress=True)
        for output in job.outputs():
            print(output.custom_id, output.text)

`AsyncClient` is the one implementation; `Client` makes the same calls over connections that block, without an event
loop or a thread. A job is known by its id, so a script that was interrupted goes on with `client.job(job_id)`.
"""

from __future__ import annotations

import json
import random
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import aclosing
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import httpx

from jobs.client.event_filter import Reader
from jobs.client.parameters import Parameters
from jobs.client.progress import ProgressBar
from jobs.client.prompts import Prompts, body_of
from jobs.client.results import JobInfo, Output, Statistics, frame, rows
from jobs.client.transport import AsyncWire, BlockingWire, Refusal, Wire, finish
from jobs.errors import (
    BasicError,
    InvalidKey,
    JobRefused,
    LimitReached,
    NotCancellable,
    NotFound,
    NotPermitted,
    ServiceUnavailable,
)
from jobs.local.key import read_local_key
from jobs.messages import Endpoint, PartialEvent
from jobs.settings import JobsSettings

if TYPE_CHECKING:
    from pandas import DataFrame

    from jobs.local.state import LocalService

Progress = Callable[[JobInfo], object] | bool  # whom to tell how far a job is; True: a progress bar
T = TypeVar("T")
_Connect = Callable[[str, Mapping[str, str]], Wire]

_TRY_AGAIN = frozenset({429, 502, 503, 504})
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0


def default_api_url(settings: JobsSettings) -> str:
    """Return where the service is: as the environment says, else where `basic up` runs, else the default address."""
    if "api_url" in settings.model_fields_set:
        return settings.api_url
    service = local_service(settings)
    return settings.api_url if service is None else service.api_url


def default_api_key(settings: JobsSettings, api_url: str) -> str:
    """Return the key to show: what the environment says, else that of `basic up` where it is our own that runs."""
    if settings.api_key:
        return settings.api_key
    service = local_service(settings)
    ours = service is not None and service.api_url.rstrip("/") == api_url
    return read_local_key(settings.data_dir) if ours else ""


def local_service(settings: JobsSettings) -> LocalService | None:
    """Return the service that `basic up` runs on the data directory of the settings, if there is one."""
    if sys.platform == "win32":  # embedded mode needs file locks that are not there
        return None
    from jobs.local.state import running

    return running(settings.data_dir)


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
        """Connect lazily. `patience_s`: for so long calls are tried again while the service is away or busy."""
        self._set_up(api_url, api_key, patience_s, lambda url, headers: AsyncWire(url, headers, transport))

    def _set_up(self, api_url: str | None, api_key: str | None, patience_s: float, connect: _Connect) -> None:
        settings = JobsSettings()
        self.api_url = (api_url or default_api_url(settings)).rstrip("/")
        key = default_api_key(settings, self.api_url) if api_key is None else api_key
        self._patience_s = patience_s
        self._wire = connect(self.api_url, {"authorization": f"Bearer {key}"} if key else {})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._wire.close()

    async def submit(
        self,
        prompts: Prompts,
        *,
        model: str | None = None,
        endpoint: Endpoint | None = None,
        metadata: Mapping[str, str] | None = None,
        completion_window: str | None = None,
        compare_plain: int | None = None,
        idempotency_key: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> AsyncJob:
        """Submit a job: prompts from any iterable, a data frame or its column, or a file by its path or its bytes.

        A prompt is a string or a request object.

        Files hold JSON lines (prompts, request objects, or lines of an OpenAI batch file) or plain lines of text.
        `parameters` hold for all requests that bring none of their own; what nothing names is as the API has it, with
        temperature 1 (`basic submit` has 0). `compare_plain` requests are decoded both ways when the job is done: with
        drafts and without, and its statistics tell how long each way took.

        Every submission carries a key, so that one whose answer got lost is not recorded twice.
        """
        body = await self._wire.aside(lambda: body_of(prompts))
        job = {
            "model": model,
            "endpoint": endpoint or body.endpoint,
            "metadata": metadata,
            "completion_window": completion_window,
            "compare_plain": compare_plain,
        }
        fields = {name: value for name, value in (job | parameters).items() if value is not None}
        headers = {"idempotency-key": idempotency_key or str(uuid.uuid4())}
        if body.lines is not None:
            headers["content-type"] = "application/x-ndjson"
            reply = await self._call("POST", "/v1/jobs", content=body.lines, params=_query(fields), headers=headers)
        else:
            reply = await self._call("POST", "/v1/jobs", json=fields | {"requests": body.requests}, headers=headers)
        return AsyncJob(self, reply["id"])

    def job(self, job_id: str) -> AsyncJob:
        """Return the handle of a job that was submitted before."""
        return AsyncJob(self, job_id)

    async def jobs(
        self, limit: int = 20, after: str | None = None, *, mine: bool = False, id_prefix: str = ""
    ) -> list[JobInfo]:
        """List jobs, newest first: with `mine` those of the caller's own key, whatever else it may see."""
        params: dict[str, Any] = {"limit": limit, "after": after, "mine": mine or None, "id_prefix": id_prefix or None}
        given = {name: value for name, value in params.items() if value is not None}
        reply = await self._call("GET", "/v1/jobs", params=given)
        listed = [JobInfo.model_validate(job) for job in reply["data"]]
        return [job for job in listed if job.id.startswith(id_prefix)]  # an older server does not know the parameter

    async def stats(self) -> Statistics:
        """Return the numbers of everything that ran so far."""
        return await self._call("GET", "/v1/stats")

    async def job_rows(self, job_id: str | None = None, limit: int = 100) -> list[Statistics]:
        """Return the numbers of the newest jobs, or of one, each as one flat row."""
        params = {"limit": limit} if job_id is None else {"job": job_id}
        return list((await self._call("GET", "/v1/stats/jobs", params=params))["data"])

    async def get(self, job_id: str) -> JobInfo:
        """Read a job."""
        return JobInfo.model_validate(await self._call("GET", f"/v1/jobs/{job_id}"))

    async def cancel(self, job_id: str) -> JobInfo:
        """Cancel a job; what is finished stays."""
        return JobInfo.model_validate(await self._call("POST", f"/v1/jobs/{job_id}/cancel"))

    async def retry(self, job_id: str, *, idempotency_key: str | None = None) -> AsyncJob:
        """Run the requests of an ended job that have no result again: as a new job, which is returned."""
        headers = {"idempotency-key": idempotency_key or str(uuid.uuid4())}
        reply = await self._call("POST", f"/v1/jobs/{job_id}/retry", headers=headers)
        return AsyncJob(self, reply["id"])

    async def job_stats(self, job_id: str) -> Statistics:
        """Return the numbers of a job."""
        return await self._call("GET", f"/v1/jobs/{job_id}/stats")

    async def wait(self, job_id: str, progress: Progress = False, poll_s: float = 1.0) -> JobInfo:
        """Wait until a job has ended, telling `progress` about it meanwhile; True shows a progress bar."""
        with ProgressBar.of(progress) as tell:
            while True:
                info = await self.get(job_id)
                tell(info)
                if info.status.final:
                    return info
                await self._wire.pause(poll_s)

    async def outputs(self, job_id: str, *, failed: bool = False, follow: bool = False) -> AsyncGenerator[Output]:
        """Yield the answers of a job so far, in its order; only those that failed, if asked for.

        With `follow` go on until the job ends: answers then come in the order in which they are ready. A broken
        connection is taken up where it broke.
        """
        place: dict[str, Any] = {"cursor": ""} if follow else {"after": -1}
        pauses = self._pauses()
        while True:
            try:
                params = place | {"failed": failed, "follow": follow}
                async with aclosing(self._lines(f"/v1/jobs/{job_id}/outputs", params)) as lines:
                    async for line in lines:
                        output = Output.model_validate_json(line)
                        place = {"cursor": output.cursor} if follow else {"after": output.index}
                        pauses = self._pauses()
                        yield output
                return
            except (httpx.TransportError, _Busy) as exc:
                await pauses.pause_or_raise(*self._why(exc))

    async def results(self, job_id: str, *, failed: bool = False) -> list[dict[str, Any]]:
        """Return the answers so far as plain dicts, one a choice: a request that failed has one with its error."""
        async with aclosing(self.outputs(job_id, failed=failed)) as outputs:
            return [row async for output in outputs for row in rows(output)]

    async def dataframe(self, job_id: str, *, failed: bool = False) -> DataFrame:
        """Return the answers so far as a pandas DataFrame: the rows of `results`."""
        return frame(await self.results(job_id, failed=failed))

    async def follow(self, job_id: str) -> AsyncGenerator[PartialEvent]:
        """Yield what is written as it is written, until the job ends. Lost connections are taken up again, unseen."""
        reader = Reader()  # the service tells nothing twice; but it may have to start over
        place = _LastEvent()
        pauses = self._pauses()
        while True:
            try:
                async with aclosing(self._events(job_id, place)) as events:
                    async for event in events:
                        pauses = self._pauses()
                        if reader.take(event):
                            yield event
                        if event.status is not None and event.status.final:
                            return
                await pauses.pause_or_raise(ServiceUnavailable(f"{self.api_url} ends the stream before the job does."))
            except (httpx.TransportError, _Busy) as exc:
                await pauses.pause_or_raise(*self._why(exc))

    async def _events(self, job_id: str, place: _LastEvent) -> AsyncGenerator[PartialEvent]:
        """Yield the events of one connection, and note the id of each when whoever follows comes for the next."""
        headers = {"last-event-id": place.id} if place.id else {}
        event_id: str | None = None
        async with aclosing(self._lines(f"/v1/jobs/{job_id}/events", {}, headers)) as lines:
            async for line in lines:
                if line.startswith("id:"):
                    event_id = line[3:].strip()
                elif line.startswith("data:"):
                    yield PartialEvent.model_validate_json(line[5:])
                    place.id = event_id or place.id
                    event_id = None

    async def _lines(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[str]:
        """Yield the lines of a reply as they come. They end at newlines only: U+2028 may stand inside JSON."""
        rest = ""
        try:
            async with aclosing(self._wire.texts(path, params, headers or {})) as texts:
                async for text in texts:
                    *lines, rest = (rest + text).split("\n")
                    for line in lines:
                        yield line
        except Refusal as refused:
            response = refused.response
            if response.status_code in _TRY_AGAIN:
                raise _Busy(_error(response), response.headers.get("retry-after")) from None
            raise _error(response) from None

    async def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Call the service, again while it is away or busy; return the reply or raise the error it answered."""
        pauses = self._pauses()
        while True:
            try:
                response = await self._wire.send(method, path, **arguments)
            except httpx.TransportError as exc:
                await pauses.pause_or_raise(self._away(exc))
                continue
            if response.is_success:
                return response.json()  # type: ignore[no-any-return]
            if response.status_code not in _TRY_AGAIN:
                raise _error(response)
            await pauses.pause_or_raise(_error(response), response.headers.get("retry-after"))

    def _pauses(self) -> _Pauses:
        return _Pauses(self._patience_s, self._wire)

    def _why(self, exc: httpx.TransportError | _Busy) -> tuple[BasicError, str | None]:
        """Return what to raise if there is no patience, and when the service wants to be asked again."""
        return (exc.error, exc.retry_after) if isinstance(exc, _Busy) else (self._away(exc), None)

    def _away(self, exc: httpx.TransportError) -> ServiceUnavailable:
        reason = str(exc) or type(exc).__name__
        return ServiceUnavailable(f"{self.api_url} does not answer: {reason}. Is bASIC running? `basic up` starts it.")


class _LastEvent:
    """The id of the last event that was passed on."""

    id: str | None = None


class _Busy(Exception):
    """The service says that it can't answer now."""

    def __init__(self, error: BasicError, retry_after: str | None) -> None:
        self.error = error
        self.retry_after = retry_after


class AsyncJob:
    """A job of an AsyncClient."""

    def __init__(self, client: AsyncClient, job_id: str) -> None:
        """Remember whose job it is; nothing is asked yet."""
        self._client = client
        self.id = job_id

    async def info(self) -> JobInfo:
        """Read the job."""
        return await self._client.get(self.id)

    async def wait(self, progress: Progress = False, poll_s: float = 1.0) -> JobInfo:
        """Wait until the job has ended; `progress=True` shows a progress bar."""
        return await self._client.wait(self.id, progress, poll_s)

    def follow(self) -> AsyncGenerator[PartialEvent]:
        """Yield what is written as it is written."""
        return self._client.follow(self.id)

    def outputs(self, *, failed: bool = False, follow: bool = False) -> AsyncGenerator[Output]:
        """Yield the answers so far, in the job's order; with `follow` all, as they are ready."""
        return self._client.outputs(self.id, failed=failed, follow=follow)

    async def results(self, *, failed: bool = False) -> list[dict[str, Any]]:
        """Return the answers so far as plain dicts."""
        return await self._client.results(self.id, failed=failed)

    async def dataframe(self, *, failed: bool = False) -> DataFrame:
        """Return the answers so far as a pandas DataFrame."""
        return await self._client.dataframe(self.id, failed=failed)

    async def cancel(self) -> JobInfo:
        """Cancel the job."""
        return await self._client.cancel(self.id)

    async def retry(self, *, idempotency_key: str | None = None) -> AsyncJob:
        """Run what has no result again, as a new job."""
        return await self._client.retry(self.id, idempotency_key=idempotency_key)

    async def stats(self) -> Statistics:
        """Return the numbers of the job."""
        return await self._client.job_stats(self.id)


class _BlockingClient(AsyncClient):
    """The same calls over connections that block: none of its coroutines ever suspends."""

    def __init__(
        self, api_url: str | None, api_key: str | None, patience_s: float, transport: httpx.BaseTransport | None
    ) -> None:
        self._set_up(api_url, api_key, patience_s, lambda url, headers: BlockingWire(url, headers, transport))


class Client:
    """A connection to the service, for code without asyncio. Several threads may share it."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        patience_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Connect lazily; arguments as for AsyncClient."""
        self._client = _BlockingClient(api_url, api_key, patience_s, transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        finish(self._client.close())

    @property
    def api_url(self) -> str:
        """Where the service is."""
        return self._client.api_url

    def submit(
        self,
        prompts: Prompts,
        *,
        model: str | None = None,
        endpoint: Endpoint | None = None,
        metadata: Mapping[str, str] | None = None,
        completion_window: str | None = None,
        compare_plain: int | None = None,
        idempotency_key: str | None = None,
        **parameters: Unpack[Parameters],
    ) -> Job:
        """Submit a job; arguments as for AsyncClient.submit."""
        submitted = finish(
            self._client.submit(
                prompts,
                model=model,
                endpoint=endpoint,
                metadata=metadata,
                completion_window=completion_window,
                compare_plain=compare_plain,
                idempotency_key=idempotency_key,
                **parameters,
            )
        )
        return Job(self, submitted.id)

    def job(self, job_id: str) -> Job:
        """Return the handle of a job that was submitted before."""
        return Job(self, job_id)

    def jobs(
        self, limit: int = 20, after: str | None = None, *, mine: bool = False, id_prefix: str = ""
    ) -> list[JobInfo]:
        """List jobs, newest first; arguments as for AsyncClient.jobs."""
        return finish(self._client.jobs(limit, after, mine=mine, id_prefix=id_prefix))

    def stats(self, limit: int = 100) -> DataFrame | list[Statistics]:
        """Return the numbers of the newest jobs: a DataFrame with a row a job; a list of rows without pandas."""
        rows = finish(self._client.job_rows(limit=limit))
        try:
            import pandas
        except ModuleNotFoundError:
            return rows
        return pandas.DataFrame(rows)

    def run(self, call: Callable[[AsyncClient], Awaitable[T]]) -> T:
        """Make one call of the asynchronous client; it must wait for the service only."""

        async def run() -> T:
            return await call(self._client)

        return finish(run())

    def iterate(self, stream: Callable[[AsyncClient], AsyncGenerator[T]]) -> Generator[T]:
        """Iterate over a stream of the asynchronous client; leaving the loop, Ctrl-C included, closes it."""
        items = stream(self._client)

        async def step() -> tuple[T] | None:
            async for item in items:
                return (item,)
            return None

        try:
            while (item := finish(step())) is not None:
                yield item[0]
        finally:
            finish(_closed(items))


async def _closed(items: AsyncGenerator[Any]) -> None:
    await items.aclose()


class Job:
    """A job of a Client."""

    def __init__(self, client: Client, job_id: str) -> None:
        """Remember whose job it is; nothing is asked yet."""
        self._client = client
        self.id = job_id

    def info(self) -> JobInfo:
        """Read the job."""
        return self._client.run(lambda client: client.get(self.id))

    def wait(self, progress: Progress = False, poll_s: float = 1.0) -> JobInfo:
        """Wait until the job has ended; `progress=True` shows a progress bar."""
        return self._client.run(lambda client: client.wait(self.id, progress, poll_s))

    def follow(self) -> Iterator[PartialEvent]:
        """Yield what is written as it is written."""
        return self._client.iterate(lambda client: client.follow(self.id))

    def outputs(self, *, failed: bool = False, follow: bool = False) -> Iterator[Output]:
        """Yield the answers so far, in the job's order; with `follow` all, as they are ready."""
        return self._client.iterate(lambda client: client.outputs(self.id, failed=failed, follow=follow))

    def results(self, *, failed: bool = False) -> list[dict[str, Any]]:
        """Return the answers so far as plain dicts."""
        return self._client.run(lambda client: client.results(self.id, failed=failed))

    def dataframe(self, *, failed: bool = False) -> DataFrame:
        """Return the answers so far as a pandas DataFrame."""
        return self._client.run(lambda client: client.dataframe(self.id, failed=failed))

    def cancel(self) -> JobInfo:
        """Cancel the job."""
        return self._client.run(lambda client: client.cancel(self.id))

    def retry(self, *, idempotency_key: str | None = None) -> Job:
        """Run what has no result again, as a new job."""
        again = self._client.run(lambda client: client.retry(self.id, idempotency_key=idempotency_key))
        return Job(self._client, again.id)

    def stats(self) -> Statistics:
        """Return the numbers of the job."""
        return self._client.run(lambda client: client.job_stats(self.id))


class _Pauses:
    """The pauses between tries of one call: longer each time, with jitter, until the patience is used up."""

    def __init__(self, patience_s: float, wire: Wire) -> None:
        self._wire = wire
        self._left_s = patience_s
        self._next_s = _FIRST_PAUSE_S

    async def pause_or_raise(self, error: BasicError, retry_after: str | None = None) -> None:
        """Sleep before the next try, or raise the error if there is no patience for it."""
        pause_s = max(_asked_s(retry_after), self._next_s * random.uniform(0.5, 1.0))
        if pause_s > self._left_s:
            raise error
        self._left_s -= pause_s
        self._next_s = min(2 * self._next_s, _LONGEST_PAUSE_S)
        await self._wire.pause(pause_s)


def _asked_s(retry_after: str | None) -> float:
    """Return the seconds of a `Retry-After`, which is a number or a date."""
    try:
        if retry_after is None or retry_after.replace(".", "", 1).isdecimal():
            return float(retry_after or 0)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _error(response: httpx.Response) -> BasicError:
    """Return the exception for an answer: the class of its code, else of its status."""
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error["code"], error["param"]
    except (ValueError, KeyError, TypeError):
        message, code, param = f"The service answered {response.status_code} {response.reason_phrase}.", None, None
    return _error_class(response.status_code, code)(message, param=param)


def _error_class(status_code: int, code: str | None) -> type[BasicError]:
    by_status = {401: InvalidKey, 403: NotPermitted, 404: NotFound, 409: NotCancellable, 429: LimitReached}
    by_status[503] = ServiceUnavailable
    fallback = by_status.get(status_code, JobRefused if status_code < 500 else BasicError)
    return next((kind for kind in _tree(BasicError) if code is not None and kind.code == code), fallback)


def _tree(root: type[BasicError]) -> Iterator[type[BasicError]]:
    yield root
    for kind in root.__subclasses__():
        yield from _tree(kind)


def _query(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
