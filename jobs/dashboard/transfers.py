"""Files of the dashboard: the outputs of a job and reports of verifications to save, and a file submitted as a job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from starlette.datastructures import State
from starlette.types import Receive, Send
from starlette.types import Scope as HttpScope

from jobs.api.auth.caller import Caller
from jobs.api.dependencies import Services, find_job
from jobs.api.routes.job_outputs import OutputSource
from jobs.api.routes.jobs import submit as submit_job
from jobs.api.routes.verifications import find_verification
from jobs.api.routes.verifications import report as read_report
from jobs.dashboard.session import BASE, SUBMIT_PATH, PageContext, Sessions
from jobs.errors import CallerRefused
from jobs.keys import Scope


def add_transfers(api: FastAPI, services: Services, sessions: Sessions) -> None:
    """Add the routes, authenticated by the session cookie, since a browser sends no API key."""
    _add_download(api, services, sessions)
    _add_report(api, services, sessions)
    _add_upload(api, services, sessions)


def _add_download(api: FastAPI, services: Services, sessions: Sessions) -> None:
    """Add the outputs of a job."""

    def outputs(job_id: str, caller: Caller) -> Response:
        job = find_job(services, job_id, caller)
        headers = {"content-disposition": f'attachment; filename="{job.id}.jsonl"'}
        lines = OutputSource(services, job).lines(after=-1)
        return _Download(lines, caller, api.state, headers=headers, media_type="application/x-ndjson; charset=utf-8")

    _add_file(api, "jobs/{item_id}/outputs", services, sessions, outputs)


def _add_report(api: FastAPI, services: Services, sessions: Sessions) -> None:
    """Add the signed report of a verification: else as `GET /v1/verifications/{id}/report`."""

    def report(verification_id: str, caller: Caller) -> Response:
        found = find_verification(verification_id, services, caller)
        reply = read_report(found, services, caller)
        reply.headers["content-disposition"] = f'attachment; filename="{found.id}.json"'
        return reply

    _add_file(api, "verifications/{item_id}/report", services, sessions, report)


def _add_file(
    api: FastAPI, path: str, services: Services, sessions: Sessions, read: Callable[[str, Caller], Response]
) -> None:
    """Add a file that a link of a page opens; `read` runs in a thread. Without a session the browser gets the login."""

    @api.get(f"{BASE}/{path}", include_in_schema=False)
    async def file(request: Request, item_id: str) -> Response:
        try:
            caller = await PageContext.of(request, services, sessions).authenticate()
        except CallerRefused:
            return RedirectResponse(f"{BASE}/login", 303)
        return await run_in_threadpool(read, item_id, caller)


def _add_upload(api: FastAPI, services: Services, sessions: Sessions) -> None:
    """Add the submission of a file, which the browser sends with the session cookie: else as `POST /v1/jobs`."""

    @api.post(SUBMIT_PATH, include_in_schema=False)
    async def submit(request: Request) -> Response:
        caller = await PageContext.of(request, services, sessions).authenticate(Scope.SUBMIT)
        return await submit_job(request, services, caller)


class _Download(StreamingResponse):
    """A download that counts as a stream of its key, and is closed when the key is revoked or expires."""

    def __init__(self, content: Iterator[str], caller: Caller, state: State, **fields: Any) -> None:
        super().__init__(content, **fields)
        self._caller = caller
        self._state = state

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        """Send the file."""
        key_id = self._caller.key_id
        with self._state.stream_limits.slot(key_id):
            if not key_id:
                await super().__call__(scope, receive, send)
                return
            with self._state.revocations.watch(key_id, send) as watched:
                await super().__call__(scope, receive, watched)
