"""The dialog that adds a webhook endpoint, and the one that shows its secret once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.api.write_threads import run_write
from jobs.dashboard import html
from jobs.dashboard.layout import heading
from jobs.dashboard.session import PageContext
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.webhooks import endpoints
from jobs.webhooks.endpoints import MAX_NAME_CHARS, in_call_thread
from storage.webhooks import EVENT_TYPES, EndpointView

_CHOSEN: Final = frozenset(kind for kind in EVENT_TYPES if kind.startswith("batch."))
_HINT: Final = "A public https address. BASIC_WEBHOOK_NETWORKS of the service allows networks of your own."


class EndpointForm:
    """The form of a new endpoint."""

    def __init__(self, context: PageContext, caller: Caller, refresh: Callable[[], Awaitable[None]]) -> None:
        """Open the dialog; call `refresh` when an endpoint was added."""
        self._context, self._caller, self._refresh = context, caller, refresh
        with (
            ui.dialog(value=True).props('persistent aria-label="New webhook"') as self._dialog,
            ui.card().style("width:30rem;max-width:95vw;background:var(--card)"),
        ):
            heading("New webhook")
            self._url = ui.input("URL", placeholder="https://example.com/hook").props("autofocus maxlength=2000")
            ui.label(_HINT).classes("dim small")
            self._name = ui.input("Name (optional)").props(f"maxlength={MAX_NAME_CHARS}")
            for field in (self._url, self._name):
                field.props("outlined dense").style("width:100%")
            with ui.element("fieldset").style("border:0;padding:0;margin:0"):
                with ui.element("legend").classes("small"):
                    ui.label("Events")
                with ui.element("div").style("display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr))"):
                    self._events = {kind: _checkbox(kind, kind in _CHOSEN) for kind in EVENT_TYPES}
            self._all_keys = _checkbox("Jobs of all keys", value=False)
            self._all_keys.set_visibility(context.is_admin and bool(caller.key_id))
            self._problem = ui.label().props('role="alert"').style("color:var(--bad)")
            with ui.element("div").classes("line"):
                ui.button("Add", on_click=self._save).props("no-caps")
                ui.button("Close", on_click=self._dialog.close).props("flat no-caps")

    async def _save(self) -> None:
        try:
            added = await self._added(self._fields())
        except BasicError as refused:
            self._problem.set_text(html.safe(str(refused)))
            return
        self._dialog.close()
        show_secret(added)
        await self._refresh()

    async def _added(self, fields: dict[str, Any]) -> EndpointView:
        caller, services = await self._context.authenticate(Scope.SUBMIT), self._context.services
        read = partial(
            endpoints.read_endpoint, fields, caller.key_id, sees_all=caller.sees_all, settings=services.settings
        )
        new = await in_call_thread(read)
        return await run_write(endpoints.add_endpoint, services.database, new, caller.sees)

    def _fields(self) -> dict[str, Any]:
        return {
            "url": (self._url.value or "").strip(),
            "name": (self._name.value or "").strip(),
            "event_types": [kind for kind, box in self._events.items() if box.value],
            "all_keys": bool(self._all_keys.value),
        }


def show_secret(endpoint: EndpointView) -> None:
    """Show the secret of an endpoint in a dialog that only its button closes."""
    with (
        ui.dialog(value=True).props('persistent aria-label="Secret"') as dialog,
        ui.card().style("max-width:95vw;background:var(--card)"),
    ):
        heading("Save the secret now: it is not shown again")
        ui.label(endpoint.secret).props('data-secret=""').classes("mono")
        ui.label("Your receiver checks with it that events come from this service.").classes("dim small")
        ui.button("I have saved it", on_click=dialog.close).props("no-caps")


def _checkbox(text: str, value: bool) -> ui.checkbox:
    return ui.checkbox(text, value=value).props(f'dense aria-label="{text}"')  # Quasar hides its own label
