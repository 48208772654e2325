"""The page of API keys, for administrators: list, create and revoke them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

from nicegui import ui
from sqlalchemy.orm import Session

from jobs.api.auth.caller import Caller
from jobs.api.write_threads import run_write
from jobs.client.durations import parse_duration_s
from jobs.dashboard import format, html
from jobs.dashboard.layout import frame, heading
from jobs.dashboard.session import PageContext
from jobs.errors import BasicError, InvalidValue, NotPermitted
from jobs.keys import KeyLimits, Scope, new_key
from storage import keys
from storage.keys import KeyView
from storage.records import NewKey

_MAX_NAME_CHARS: Final = 100
_REFRESH_S: Final = 3.0
_AGO_S: Final = 30.0  # interval at which the page updates its relative times
_FIRST: Final = (
    "There is no key: every user of this machine may use the service, and no other host reaches it. "
    "Create the first key on the command line; from then on every request and page needs one: "
    "basic keys create admin --scope admin"
)


async def build(context: PageContext, caller: Caller) -> None:
    """Build the page; tell a caller who is no administrator what it needs."""
    with frame("Keys", context):
        heading("Keys", 1)
        try:
            await context.authenticate(Scope.ADMIN)
        except NotPermitted:
            ui.label("Only a key with the scope admin may see the keys.").classes("dim")
            return
        page = KeyList(context)
        await page.refresh()
        ui.timer(_REFRESH_S, page.refresh, immediate=False)


class KeyList:
    """The keys, and the button that creates one."""

    def __init__(self, context: PageContext) -> None:
        """Add an empty list; `refresh` fills it."""
        self._context = context
        self._new = ui.button("New key", icon="add", on_click=self._create).props("no-caps").style("align-self:start")
        self._first = ui.label(_FIRST).classes("dim")
        self._list = ui.element("div").props('role="list" aria-label="Keys"').classes("stack")
        self._dialogs = ui.element("div")  # beside the list, whose rows are redrawn
        self._shown: tuple[object, ...] = ()

    async def refresh(self) -> None:
        """Read the keys and show them; valid ones first."""
        await self._context.authenticate(Scope.ADMIN)
        found = sorted(await self._context.read(keys.list_keys), key=lambda key: not key.valid)
        shown = (int(time.time() // _AGO_S), *found)
        if shown == self._shown:
            return
        self._shown = shown
        self._new.set_visibility(bool(found))
        self._first.set_visibility(not found)
        self._list.set_visibility(bool(found))
        self._list.clear()
        with self._list:
            for key in found:
                self._row(key)

    def _row(self, key: KeyView) -> None:
        with ui.element("div").props('role="listitem"').classes("box line"):
            with ui.element("div").classes("grow"):
                ui.label(html.safe(key.name)).style("font-weight:600")
                ui.label(key.id).classes("mono dim")
            ui.label(", ".join(key.scopes)).classes("small")
            ui.label(_limits(key)).classes("small")
            ui.label(_state(key)).classes("dim small")
            if key.valid:
                ui.button("Revoke", on_click=partial(self._ask_to_revoke, key)).props("outline no-caps color=negative")

    def _ask_to_revoke(self, key: KeyView) -> None:
        with (
            self._dialogs,
            ui.dialog(value=True).props('aria-label="Revoke a key"') as dialog,
            ui.card().style("background:var(--card)"),
        ):
            heading(f"Revoke the key {html.safe(key.name)}?")
            ui.label("Its next call is refused, and its pages and streams close. Its jobs continue.")
            with ui.element("div").classes("line"):
                ui.button("Revoke", on_click=partial(self._revoke, key, dialog)).props("no-caps color=negative")
                ui.button("Close", on_click=dialog.close).props("flat no-caps")

    async def _revoke(self, key: KeyView, dialog: ui.dialog) -> None:
        dialog.close()
        await _write(self._context, lambda session: keys.revoke_key(session, key.id))
        await self.refresh()

    def _create(self) -> None:
        _KeyForm(self._context, self.refresh)


class _KeyForm:
    """The dialog that creates a key and shows it once."""

    def __init__(self, context: PageContext, refresh: Callable[[], Awaitable[None]]) -> None:
        self._context, self._refresh = context, refresh
        with ui.dialog(value=True).props('persistent aria-label="New key"') as self._dialog:
            self._card = ui.card().style("width:30rem;max-width:95vw;background:var(--card)")
        with self._card:
            heading("New key")
            self._name = ui.input("Owner or purpose").props(f"autofocus maxlength={_MAX_NAME_CHARS}")
            self._scopes = {scope: ui.checkbox(text, value=on) for scope, text, on in _SCOPES}
            for scope, box_ in self._scopes.items():
                box_.props(f'aria-label="{scope}"')
            self._requests = ui.number("Maximum queued requests (empty: no limit)", min=1, precision=0)
            self._rate = ui.number("Maximum requests per minute (empty: no limit)", min=1, precision=0)
            self._lifetime = ui.input("Lifetime such as 30d (empty: no expiry)")
            for field in (self._name, self._requests, self._rate, self._lifetime):
                field.props("outlined dense").style("width:100%")
            self._problem = ui.label().props('role="alert"').style("color:var(--bad)")
            with ui.element("div").classes("line"):
                ui.button("Create", on_click=self._save).props("no-caps")
                ui.button("Close", on_click=self._dialog.close).props("flat no-caps")

    async def _save(self) -> None:
        try:
            key, stored = self._filled()
            await _write(self._context, lambda session: keys.add_key(session, stored))
        except BasicError as refused:
            self._problem.set_text(html.safe(str(refused)))
            return
        self._card.clear()
        with self._card:
            heading("Save the key now: it is not shown again")
            ui.label(key).props('data-key=""').classes("mono")
            ui.button("I have saved it", on_click=self._dialog.close).props("no-caps")
        await self._refresh()

    def _filled(self) -> tuple[str, NewKey]:
        name = (self._name.value or "").strip()
        if not name:
            raise InvalidValue("give it a name", param="name")
        scopes = tuple(scope for scope, box_ in self._scopes.items() if box_.value)
        if not scopes:
            raise InvalidValue("choose at least one", param="scope")
        limits = KeyLimits(
            requests_queued=format.whole(self._requests.value), requests_per_minute=format.whole(self._rate.value)
        )
        return new_key(name, scopes, limits, _lifetime_s(self._lifetime.value or ""))


_SCOPES: Final = (
    (Scope.SUBMIT, "submit: create and cancel its own jobs", True),
    (Scope.READ, "read: its own jobs and the statistics", True),
    (Scope.ADMIN, "admin: everything, and the jobs of all keys", False),
)


async def _write(context: PageContext, change: Callable[[Session], object]) -> None:
    """Change the keys in a transaction, as an administrator."""
    await context.authenticate(Scope.ADMIN)

    def write() -> None:
        with context.services.database.write() as session:
            change(session)

    await run_write(write)


def _lifetime_s(text: str) -> float | None:
    try:
        return parse_duration_s(text.strip(), max_digits=4) if text.strip() else None
    except ValueError:
        raise InvalidValue("must be a number and m, h or d, such as 30d", param="lifetime") from None


def _limits(key: KeyView) -> str:
    limits = (
        (key.max_requests_queued, "queued requests"),
        (key.max_tokens_queued, "queued tokens"),
        (key.max_requests_per_minute, "requests per minute"),
    )
    return ", ".join(f"{limit:,d} {what}" for limit, what in limits if limit is not None) or "no limits"


def _state(key: KeyView) -> str:
    if key.revoked_at is not None:
        return f"revoked {format.ago(key.revoked_at)}"
    if not key.valid:
        return "expired"
    left = "" if key.expires_at is None else f", expires in {format.span(key.expires_at - time.time())}"
    return f"created {format.ago(key.created_at)}{left}"
