"""The client for code without asyncio: submit prompts, follow the text, fetch the outputs.

    with Client() as client:
        job = client.submit(["What is the capital of France?"], max_tokens=20, temperature=0)
        job.wait(progress=True)
        for output in job.outputs():
            print(output.custom_id, output.text)

A job is identified by its id: after an interruption, `client.job(job_id)` continues with it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack

import httpx

from jobs.client.async_client import AsyncClient, CountPrompts
from jobs.client.connection import BlockingConnection, run_without_loop
from jobs.client.parameters import JobChanges, Parameters
from jobs.client.progress_bar import ProgressCallback
from jobs.client.request_body import ALL_COLUMNS, Prompts
from jobs.client.response_format import ResponseFormat
from jobs.client.results import JobCheck, JobEstimate, JobInfo, Output, Statistics
from jobs.messages import Endpoint, JobStatus, PartialEvent, Priority
from jobs.tables.columns import Columns

if TYPE_CHECKING:
    from pandas import DataFrame

T = TypeVar("T")


class _BlockingClient(AsyncClient):
    """An AsyncClient over a connection that blocks: its coroutines never suspend."""

    def __init__(
        self, api_url: str | None, api_key: str | None, patience_s: float, transport: httpx.BaseTransport | None
    ) -> None:
        self._set_up(api_url, api_key, patience_s, lambda url, headers: BlockingConnection(url, headers, transport))


class Client:
    """A connection to the service, for code without asyncio. Threads may share it."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        patience_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Configure the client; arguments as for AsyncClient."""
        self._client = _BlockingClient(api_url, api_key, patience_s, transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        run_without_loop(self._client.close())

    @property
    def api_url(self) -> str:
        """Base URL of the service: the argument, or the one that was found."""
        return self._client.api_url

    def submit(
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
    ) -> Job:
        """Submit a job; arguments as for AsyncClient.submit."""
        submitted = run_without_loop(
            self._client.submit(
                prompts,
                model=model,
                endpoint=endpoint,
                metadata=metadata,
                name=name,
                labels=labels,
                priority=priority,
                max_concurrent=max_concurrent,
                completion_window=completion_window,
                compare_plain=compare_plain,
                pilot=pilot,
                budget=budget,
                idempotency_key=idempotency_key,
                columns=columns,
                **parameters,
            )
        )
        return Job(self, submitted.id, submitted.response_format)

    def check(
        self,
        prompts: Prompts,
        *,
        model: str | None = None,
        endpoint: Endpoint | None = None,
        columns: Columns = ALL_COLUMNS,
        count: CountPrompts | None = None,
        **parameters: Unpack[Parameters],
    ) -> JobCheck:
        """Check what `submit` would send, and store nothing; arguments as for AsyncClient.check."""
        return run_without_loop(
            self._client.check(prompts, model=model, endpoint=endpoint, columns=columns, count=count, **parameters)
        )

    def job(self, job_id: str, response_format: ResponseFormat | None = None) -> Job:
        """Return the handle of a job that was submitted before; arguments as for AsyncClient.job."""
        return Job(self, job_id, response_format)

    def jobs(
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
        """List jobs, newest first; arguments as for AsyncClient.jobs."""
        return run_without_loop(
            self._client.jobs(
                limit,
                after,
                mine=mine,
                id_prefix=id_prefix,
                labels=labels,
                status=status,
                name=name,
                model=model,
                search=search,
            )
        )

    def pause(self, job_id: str) -> JobInfo:
        """Pause a job; as AsyncClient.pause."""
        return run_without_loop(self._client.pause(job_id))

    def resume(self, job_id: str) -> JobInfo:
        """Resume a paused job; as AsyncClient.resume."""
        return run_without_loop(self._client.resume(job_id))

    def change(self, job_id: str, **changes: Unpack[JobChanges]) -> JobInfo:
        """Change the name, labels, priority or concurrency limit of a job; as AsyncClient.change."""
        return run_without_loop(self._client.change(job_id, **changes))

    def delete(self, job_id: str, *, cancel: bool = False) -> None:
        """Erase a job that has ended: prompts, outputs, steps and its files. `cancel`: one that still runs, too."""
        run_without_loop(self._client.delete(job_id, cancel=cancel))

    def stats(self, limit: int = 100) -> DataFrame | list[Statistics]:
        """Return the statistics of the newest jobs, one row per job: a DataFrame, or a list of dicts without pandas."""
        rows = run_without_loop(self._client.job_rows(limit=limit))
        try:
            import pandas
        except ModuleNotFoundError:
            return rows
        return pandas.DataFrame(rows)

    def run(self, call: Callable[[AsyncClient], Awaitable[T]]) -> T:
        """Make one call of the asynchronous client. The call may wait for the service, but for nothing else."""

        async def run() -> T:
            return await call(self._client)

        return run_without_loop(run())

    def iterate(self, stream: Callable[[AsyncClient], AsyncGenerator[T]]) -> Generator[T]:
        """Iterate over a stream of the asynchronous client. Leaving the loop, also by Ctrl-C, closes the stream."""
        items = stream(self._client)

        async def step() -> tuple[T] | None:
            async for item in items:
                return (item,)
            return None

        try:
            while (item := run_without_loop(step())) is not None:
                yield item[0]
        finally:
            run_without_loop(_closed(items))


async def _closed(items: AsyncGenerator[Any]) -> None:
    await items.aclose()


class Job:
    """A job of a Client. Creating the handle sends nothing."""

    def __init__(self, client: Client, job_id: str, response_format: ResponseFormat | None = None) -> None:
        self._client = client
        self.id = job_id
        self.response_format = response_format

    def info(self) -> JobInfo:
        """Return the job's status, counts and progress."""
        return self._client.run(lambda client: client.get(self.id))

    def wait(self, progress: ProgressCallback = False, poll_s: float = 1.0) -> JobInfo:
        """Wait until the job ends; `progress=True` shows a progress bar."""
        return self._client.run(lambda client: client.wait(self.id, progress, poll_s))

    def follow(self) -> Iterator[PartialEvent]:
        """Yield events as text is generated, until the job ends."""
        return self._client.iterate(lambda client: client.follow(self.id))

    def outputs(
        self, *, failed: bool = False, follow: bool = False, prompt: bool = False, cursor: str = ""
    ) -> Iterator[Output]:
        """Yield the outputs so far, in the order of the requests; with `follow` all, as requests end."""
        form = self.response_format
        return self._client.iterate(
            lambda client: client.outputs(
                self.id, failed=failed, follow=follow, prompt=prompt, cursor=cursor, response_format=form
            )
        )

    def results(self, *, failed: bool = False) -> list[dict[str, Any]]:
        """Return the outputs so far as dicts."""
        form = self.response_format
        return self._client.run(lambda client: client.results(self.id, failed=failed, response_format=form))

    def dataframe(self, *, failed: bool = False) -> DataFrame:
        """Return the outputs so far as a pandas DataFrame."""
        form = self.response_format
        return self._client.run(lambda client: client.dataframe(self.id, failed=failed, response_format=form))

    def estimate(self) -> JobEstimate:
        """Wait until the pilot has ended, and return what it predicts."""
        return self._client.run(lambda client: client.estimate(self.id))

    def cancel(self) -> JobInfo:
        """Cancel the job. Outputs of completed requests are kept."""
        return self._client.run(lambda client: client.cancel(self.id))

    def delete(self, *, cancel: bool = False) -> None:
        """Erase the job, which has ended: prompts, outputs, steps and its files. `cancel`: cancel it first."""
        self._client.delete(self.id, cancel=cancel)

    def pause(self) -> JobInfo:
        """Pause the job: its running requests return to the queue with their text so far."""
        return self._client.pause(self.id)

    def resume(self) -> JobInfo:
        """Resume the job; its texts are those without the pause."""
        return self._client.resume(self.id)

    def change(self, **changes: Unpack[JobChanges]) -> JobInfo:
        """Change the name, labels, priority or concurrency limit; None removes one. Other labels stay."""
        return self._client.change(self.id, **changes)

    def retry(self, *, idempotency_key: str | None = None) -> Job:
        """Submit the requests without a result as a new job, and return it."""
        again = self._client.run(lambda client: client.retry(self.id, idempotency_key=idempotency_key))
        return Job(self._client, again.id, self.response_format)

    def stats(self) -> Statistics:
        """Return speed and speculation statistics of the job."""
        return self._client.run(lambda client: client.job_stats(self.id))
