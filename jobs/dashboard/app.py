"""Add the dashboard to the API server: its pages, log-in, download and security headers.

NiceGUI, because pages are Python functions inside FastAPI, updated over one socket, and its wheel has all that the
browser needs.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from nicegui import ui
from sqlalchemy.orm import Session
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.api.auth.authentication import Authenticator
from jobs.api.auth.caller import Caller
from jobs.api.dependencies import Services
from jobs.dashboard.body_limit import DashboardBodyLimit
from jobs.dashboard.layout import POLICY, frame, heading
from jobs.dashboard.pages import chat_page, job_page, jobs_page, keys_page, stats_page, webhooks_page, workers_page
from jobs.dashboard.session import BASE, COOKIE, PageContext, Sessions
from jobs.dashboard.transfers import add_transfers
from jobs.errors import BasicError, CallerRefused

_RECHECK_S = 1.0  # interval of the check that the session of an open page is still valid
_BUILD_S = 30.0  # timeout of building a page; a busy database may take seconds

Build = Callable[[PageContext, Caller], Awaitable[None]]


def install(api: FastAPI, services: Services, authenticator: Authenticator) -> None:
    """Add the pages to the API server. Call once per process, because NiceGUI has one application."""
    sessions = Sessions(authenticator)
    _add_login(api, sessions)
    add_transfers(api, services, sessions)
    logging.getLogger("nicegui").addFilter(_is_no_refusal)

    async def show(request: Request, build: Build) -> Any:
        """Build a page, or redirect to the log-in if the caller may not see it."""
        context = PageContext.of(request, services, sessions)
        try:
            caller = await context.authenticate()
        except CallerRefused:
            return RedirectResponse(f"{BASE}/login", 303)
        ui.on_exception(_leave_if_refused)
        context = replace(context, caller=caller)
        await build(context, caller)
        ui.timer(_RECHECK_S, partial(context.read, _nothing), immediate=False)
        return None

    @ui.page("/", response_timeout=_BUILD_S)
    async def jobs(request: Request) -> Any:
        return await show(request, jobs_page.build)

    @ui.page("/jobs/{job_id}", response_timeout=_BUILD_S)
    async def job(request: Request, job_id: str) -> Any:
        return await show(request, lambda context, caller: job_page.build(context, caller, job_id))

    @ui.page("/chat", response_timeout=_BUILD_S)
    async def chat(request: Request) -> Any:
        return await show(request, chat_page.build)

    @ui.page("/webhooks", response_timeout=_BUILD_S)
    async def webhooks(request: Request) -> Any:
        return await show(request, webhooks_page.build)

    @ui.page("/keys", response_timeout=_BUILD_S)
    async def keys(request: Request) -> Any:
        return await show(request, keys_page.build)

    @ui.page("/stats", response_timeout=_BUILD_S)
    async def stats(request: Request) -> Any:
        return await show(request, stats_page.build)

    @ui.page("/workers", response_timeout=_BUILD_S)
    async def workers(request: Request) -> Any:
        return await show(request, workers_page.build)

    @ui.page("/login")
    async def login(wrong: str = "") -> None:
        _build_login(wrong)

    ui.run_with(
        api, mount_path=BASE, title="bASIC", dark=None, language="en-US", tailwind=False, show_welcome_message=False
    )
    api.add_middleware(DashboardBodyLimit)
    api.add_middleware(ContentPolicy)


def _add_login(api: FastAPI, sessions: Sessions) -> None:
    """Add the routes that begin and end sessions: plain forms, because only an HTTP response can set a cookie."""

    @api.get("/", include_in_schema=False)
    def front() -> RedirectResponse:
        return RedirectResponse(f"{BASE}/", 307)

    @api.post(f"{BASE}/login", include_in_schema=False)
    async def login(request: Request) -> RedirectResponse:
        fields = parse_qs((await request.body()).decode(errors="replace"))
        key = fields.get("key", [""])[0].strip()
        address = request.client.host if request.client else ""
        try:
            session = await run_in_threadpool(sessions.begin, key, address)
        except BasicError as refused:
            return RedirectResponse(f"{BASE}/login?wrong={type(refused).__name__}", 303)
        reply = RedirectResponse(f"{BASE}/", 303)
        secure = request.url.scheme == "https"
        reply.set_cookie(COOKIE, session, httponly=True, samesite="strict", secure=secure, path=BASE)
        return reply

    @api.post(f"{BASE}/logout", include_in_schema=False)
    def logout(request: Request) -> RedirectResponse:
        sessions.end(request.cookies.get(COOKIE, ""))
        reply = RedirectResponse(f"{BASE}/login", 303)
        reply.delete_cookie(COOKIE, path=BASE)
        return reply


def _nothing(session: Session) -> None:
    """Query nothing: `PageContext.read` only checks the session."""


def _leave_if_refused(error: Exception) -> None:
    """Clear a page whose session is no longer valid, and show the log-in."""
    if isinstance(error, CallerRefused):
        ui.context.client.content.clear()
        ui.navigate.to("/login")


def _is_no_refusal(record: logging.LogRecord) -> bool:
    """Filter NiceGUI's logs: a page that closes because its key was revoked is not an error."""
    return record.exc_info is None or not isinstance(record.exc_info[1], CallerRefused)


_REFUSALS = {
    "LimitReached": "Too many failed attempts from this address. Wait a minute.",
    "NotPermitted": "This key lacks the scope read.",
}


def _build_login(wrong: str) -> None:
    with frame("Log in"):
        heading("Log in", 1)
        with (
            ui.element("form")
            .props(f'method="post" action="{BASE}/login"')
            .classes("box stack")
            .style("max-width:28rem")
        ):
            ui.label("Enter an API key. Create one with `basic keys create NAME --scope read`.").classes("dim")
            if wrong:
                text = _REFUSALS.get(wrong, "Invalid or expired key.")
                ui.label(text).props('role="alert"').style("color:var(--bad)")
            ui.input("Key").props('name="key" type="password" autocomplete="current-password" outlined autofocus')
            ui.button("Log in").props('type="submit" no-caps')


class ContentPolicy:
    """Adds security headers to the pages: the browser may load from this host only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; add the headers to its response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = POLICY
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "same-origin"
            await send(message)

        ours = scope["type"] == "http" and scope["path"].startswith(BASE)
        await self._app(scope, receive, send_with_headers if ours else send)
