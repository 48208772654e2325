"""The webhooks page: which URLs are called when jobs end, what was delivered to them, and what failed."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.api.write_threads import run_write
from jobs.dashboard import format, html
from jobs.dashboard.endpoint_form import EndpointForm, show_secret
from jobs.dashboard.layout import box, frame, heading, link
from jobs.dashboard.session import BASE, PageContext
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.webhooks import endpoints
from jobs.webhooks.endpoints import in_call_thread
from storage import webhooks
from storage.webhooks import DeliveryView, EndpointView

_REFRESH_S: Final = 3.0
_ENDPOINTS: Final = 100
_DELIVERIES: Final = 30
_NONE: Final = "No webhook yet. Add one with New webhook, or on the command line: basic webhooks add URL"
_NONE_TO_READ: Final = "No webhook yet. A key with the scope submit may add one."
_FILTERS: Final = {"Failed": "dead", "Waiting": "pending", "Delivered": "delivered"}
_NO_DELIVERY: Final = {
    "Failed": "No event has failed: every one was delivered, or is still tried.",
    "Waiting": "No event waits.",
    "Delivered": "Nothing was delivered yet. Events are sent when jobs end.",
}


async def build(context: PageContext, caller: Caller) -> None:
    """Build the page."""
    with frame("Webhooks", context):
        page = WebhooksPage(context, caller, may_submit=await context.may(Scope.SUBMIT))
        await page.refresh()
        ui.timer(_REFRESH_S, page.refresh, immediate=False)


class WebhooksPage:
    """The endpoints of the caller, and the deliveries to them."""

    def __init__(self, context: PageContext, caller: Caller, *, may_submit: bool) -> None:
        """Add the elements; `refresh` fills them."""
        self._context, self._caller, self._may_submit = context, caller, may_submit
        self._shown: Sequence[EndpointView] = ()
        with ui.element("div").classes("line"):
            with ui.element("div").classes("grow"):
                heading("Webhooks", 1)
            if may_submit:
                ui.button("New webhook", icon="add", on_click=self._create).props("no-caps")
        ui.label("URLs that the service calls when jobs end, with events in OpenAI's format, signed.").classes("dim")
        self._none = ui.label(_NONE if may_submit else _NONE_TO_READ)
        self._list = ui.element("div").props('role="list" aria-label="Webhooks"').classes("stack")
        self._dialogs = ui.element("div")  # beside the list, whose rows are redrawn
        self._deliveries = DeliveryList(context, caller, self._do if may_submit else None)

    async def refresh(self) -> None:
        """Read endpoints and deliveries and show them."""
        sees = self._caller.sees
        found, _ = await self._context.read(lambda session: webhooks.endpoints(session, _ENDPOINTS, None, sees))
        self._none.set_visibility(not found)
        if found != self._shown:
            self._shown = found
            self._list.clear()
            with self._list:
                for endpoint in found:
                    self._row(endpoint)
        await self._deliveries.show(found)

    def _row(self, endpoint: EndpointView) -> None:
        with ui.element("div").props('role="listitem"').classes("box stack"):
            with ui.element("div").classes("stack").style("gap:.1rem"):
                if endpoint.name:
                    ui.label(html.safe(endpoint.name)).style("font-weight:600")
                ui.label(html.safe(endpoint.url)).classes("mono")
                ui.label(f"{endpoint.id} · {_whose(endpoint)}").classes("dim small")
            with ui.element("div").classes("line").style("gap:.3rem"):
                for kind in endpoint.event_types:
                    ui.label(kind).classes("tag")
            if self._may_submit:
                answer = ui.label().props('role="status"').classes("small")
                answer.set_visibility(False)
                with ui.element("div").classes("line"):
                    self._action("Send test", partial(self._test, endpoint, answer))
                    self._action("New secret", partial(self._ask, endpoint, *_ROTATE, self._rotate))
                    self._action("Delete", partial(self._ask, endpoint, *_REMOVE, self._remove)).props("color=negative")

    def _action(self, name: str, act: Callable[[], Awaitable[None]]) -> ui.button:
        return ui.button(name, on_click=partial(self._do, act)).props("outline no-caps")

    async def _do(self, act: Callable[[], Awaitable[None]]) -> None:
        """Run an action and show the page again; show why it was refused."""
        try:
            await self._context.authenticate(Scope.SUBMIT)
            await act()
        except BasicError as refused:
            ui.notify(html.safe(str(refused)), type="warning")
        await self.refresh()

    async def _test(self, endpoint: EndpointView, answer: ui.label) -> None:
        """Send a sample event and show how the URL answers."""
        services, sees = self._context.services, self._caller.sees
        answer.set_visibility(True)
        answer.set_text("Sending…")
        send = partial(
            endpoints.send_sample, services.database, services.settings, endpoint.id, sees, endpoint.event_types[0]
        )
        try:
            answer.set_text(f"The URL answered with status {await in_call_thread(send)}.")
        except BasicError as failed:
            answer.set_text(html.safe(str(failed)))

    async def _ask(
        self, endpoint: EndpointView, question: str, meaning: str, act: Callable[[EndpointView], Awaitable[None]]
    ) -> None:
        """Ask before an action that can't be undone."""
        with (
            self._dialogs,
            ui.dialog(value=True).props(f'aria-label="{question}"') as dialog,
            ui.card().style("max-width:95vw;background:var(--card)"),
        ):
            heading(f"{question}?")
            ui.label(html.safe(endpoint.url)).classes("mono")
            ui.label(meaning)

            async def confirmed() -> None:
                dialog.close()
                await self._do(partial(act, endpoint))

            with ui.element("div").classes("line"):
                ui.button(question, on_click=confirmed).props("no-caps color=negative")
                ui.button("Close", on_click=dialog.close).props("flat no-caps autofocus")

    async def _rotate(self, endpoint: EndpointView) -> None:
        database = self._context.services.database
        changed = await run_write(endpoints.rotate_secret, database, endpoint.id, self._caller.sees, keep_old=True)
        with self._dialogs:
            show_secret(changed)

    async def _remove(self, endpoint: EndpointView) -> None:
        await run_write(endpoints.remove_endpoint, self._context.services.database, endpoint.id, self._caller.sees)

    def _create(self) -> None:
        EndpointForm(self._context, self._caller, self.refresh)


_REMOVE: Final = ("Delete webhook", "Its events that wait are deleted too, and its list of deliveries.")
_ROTATE: Final = ("New secret", "For a day both secrets sign, so that the receiver can change.")


class DeliveryList:
    """Deliveries to the endpoints of the caller, by how they ended."""

    def __init__(
        self,
        context: PageContext,
        caller: Caller,
        do: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]] | None,
    ) -> None:
        """Add an empty list. `do` runs an action and refreshes the page; None: the caller may not send again."""
        self._context, self._caller, self._do = context, caller, do
        self._shown: tuple[object, ...] = ()
        with box() as self._box:
            heading("Events")
            self._which = ui.toggle(list(_FILTERS), value="Failed", on_change=self._again).props("no-caps unelevated")
            self._none = ui.label().classes("dim")
            self._list = ui.element("div").props('role="list" aria-label="Events"').classes("stack").style("gap:0")

    async def show(self, found: Sequence[EndpointView]) -> None:
        """Read the deliveries and show them; `found` are the endpoints."""
        self._endpoints = found
        which = str(self._which.value)
        page = await self._context.read(
            lambda session: webhooks.deliveries(session, _DELIVERIES, None, self._caller.sees, status=_FILTERS[which])
        )
        self._box.set_visibility(bool(found))
        shown = (which, page.deliveries, int(time.time() // 30))  # their times change twice a minute
        if shown == self._shown or which != self._which.value:
            return
        self._shown = shown
        self._none.set_text(_NO_DELIVERY[which])
        self._none.set_visibility(not page.deliveries)
        self._list.clear()
        known = {endpoint.id: endpoint for endpoint in found}
        with self._list:
            for delivery in page.deliveries:
                self._row(delivery, known.get(delivery.endpoint_id))

    async def _again(self) -> None:
        await self.show(self._endpoints)

    def _row(self, delivery: DeliveryView, endpoint: EndpointView | None) -> None:
        name = delivery.endpoint_id if endpoint is None else endpoint.name or endpoint.url
        attempts = f"{delivery.attempts:,d} attempt{'' if delivery.attempts == 1 else 's'}"
        with ui.element("div").props('role="listitem"').classes("line listed"):
            with ui.element("div").classes("grow"):
                with ui.element("div").classes("line"):
                    ui.label(delivery.event_type)
                    with link(f"{BASE}/jobs/{delivery.job_id}").classes("mono"):
                        ui.label(f"{delivery.job_id[:18]}…")
                ui.label(f"to {html.safe(name)}").classes("dim small").style("overflow-wrap:anywhere")
            ui.label(_last_answer(delivery)).style("overflow-wrap:anywhere")
            ui.label(f"{attempts}, {_when(delivery)}").classes("small")
            if self._do is not None and delivery.status != "pending":
                again = ui.button("Send again", on_click=partial(self._do, partial(self._redeliver, delivery)))
                again.props("outline no-caps dense padding='xs sm'")

    async def _redeliver(self, delivery: DeliveryView) -> None:
        await run_write(endpoints.redeliver, self._context.services.database, delivery.id, self._caller.sees)


def _whose(endpoint: EndpointView) -> str:
    if endpoint.job_id is not None:
        return f"of job {endpoint.job_id}"
    return "jobs of all keys" if endpoint.all_keys else "jobs of its key" if endpoint.api_key_id else "all jobs"


def _last_answer(delivery: DeliveryView) -> str:
    if delivery.last_status_code is None and not delivery.last_error:
        return "not sent yet"
    status = "" if delivery.last_status_code is None else f"status {delivery.last_status_code}"
    return html.safe(": ".join(part for part in (status, delivery.last_error) if part))


def _when(delivery: DeliveryView) -> str:
    if delivery.ended_at is not None:
        return format.ago(delivery.ended_at)
    left_s = delivery.next_at - time.time()
    return f"next in {format.span(left_s)}" if left_s > 0 else "next now"
