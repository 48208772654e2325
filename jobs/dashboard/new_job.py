"""The dialog that submits a job: prompts that are typed, or a file of JSON lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlencode

from nicegui import ui

from jobs.api.write_threads import run_write
from jobs.dashboard import html
from jobs.dashboard.layout import heading
from jobs.dashboard.session import SUBMIT_PATH, PageContext
from jobs.errors import BasicError
from jobs.keys import Scope
from jobs.messages import TOOLS_TEMPERATURE
from jobs.submission.intake import Submission, create_job
from jobs.submission.items import Item
from jobs.submission.managed.fields import Managed
from jobs.submission.models import known_models

PROMPT_CHARS: Final = 150_000  # a socket message has the prompts as escaped JSON
_TREE_STEPS: Final = 32
_UPLOAD_S: Final = 86_400.0
_TOO_LONG: Final = (
    f"These prompts have {PROMPT_CHARS:,d} characters or more, which is too long for this form. "
    "Write them to a file and choose it, or run: basic submit FILE"
)
_HINT: Final = (
    "JSON lines: a prompt or a request on each. For CSV, Parquet and tables in buckets run: basic submit FILE"
)
# The browser sends the file itself, because a socket message can't hold it.
_SEND: Final = """
const file = document.getElementById(%(input)s).files[0];
if (!file) return {error: 'Choose a file, or write prompts.'};
if (/\\.(csv|tsv|parquet|arrow|xlsx?)$/i.test(file.name)) return {error: %(table)s};
const packed = file.name.endsWith('.gz');
return await new Promise(resolve => {
  const call = new XMLHttpRequest(), bar = document.getElementById(%(bar)s);
  call.open('POST', %(path)s);
  call.setRequestHeader('content-type', 'application/x-ndjson');
  if (packed) call.setRequestHeader('content-encoding', 'gzip');
  call.upload.onprogress = event => { bar.hidden = false; bar.value = event.loaded / event.total; };
  call.onerror = () => resolve({error: 'The connection broke. Try again.'});
  call.onload = () => {
    bar.hidden = true;
    let reply = {};
    try { reply = JSON.parse(call.responseText); } catch { }
    resolve(call.status == 200 ? {id: reply.id} : {error: reply.error?.message ?? `HTTP status ${call.status}`});
  };
  call.send(file);
});
"""


async def new_job_dialog(context: PageContext) -> ui.dialog:
    """Return the dialog; it leaves to the page of the job that it submits."""
    known = await asyncio.to_thread(known_models, context.services.database, context.services.settings)
    with (
        ui.dialog().props('aria-label="New job"') as dialog,
        ui.card().style("width:34rem;max-width:95vw;background:var(--card)"),
    ):
        heading("New job")
        _NewJob(context, known.names, dialog)
    return dialog


class _NewJob:
    """The form of the dialog."""

    def __init__(self, context: PageContext, models: list[str], dialog: ui.dialog) -> None:
        self._context = context
        self._dialog = dialog
        self._prompts = ui.textarea("Prompts, one per line").props(
            f"outlined autogrow autofocus maxlength={PROMPT_CHARS}"  # a longer message would close the page's socket
        )
        self._prompts.style("width:100%")
        self._lay_out_file()
        target = context.services.settings.default_model
        self._model = ui.select(models, value=target, label="Model").props("outlined").style("width:100%")
        self._name = ui.input("Name (optional)").props("outlined dense maxlength=128").style("width:100%")
        with ui.element("div").classes("line"):
            self._tokens = ui.number("Max tokens", value=128, min=1, precision=0)
            self._heat = ui.number("Temperature", value=TOOLS_TEMPERATURE, min=0, max=2, step=0.1)
            for number in (self._tokens, self._heat):
                number.props("outlined dense").style("width:9rem")
            self._trees = ui.checkbox("Record draft trees")
            self._trees.props('aria-label="Record draft trees"')  # Quasar hides its own
        self._problem = ui.label().props('role="alert"').style("color:var(--bad)")
        with ui.element("div").classes("line"):
            ui.button("Submit", on_click=self._submit).props("no-caps")
            ui.button("Close", on_click=dialog.close).props("flat no-caps")

    def _lay_out_file(self) -> None:
        with ui.element("div").classes("stack").style("gap:.2rem"):
            with ui.element("label").classes("small"):
                ui.label("Or a file")
                self._file = ui.element("input").props('type="file" accept=".jsonl,.ndjson,.json,.txt,.gz"')
            ui.label(_HINT).classes("dim small")
            self._bar = ui.element("progress").props('max="1" hidden aria-label="Uploaded"')

    async def _submit(self) -> None:
        try:
            job_id = await (self._submit_prompts() if self._prompts.value else self._submit_file())
        except BasicError as refused:
            self._problem.set_text(html.safe(str(refused)))
            return
        if job_id is not None:
            self._dialog.close()
            ui.navigate.to(f"/jobs/{job_id}")

    async def _submit_prompts(self) -> str | None:
        text = self._prompts.value or ""
        if _javascript_length(text) >= PROMPT_CHARS:  # the browser may have cut the text at maxlength
            self._problem.set_text(_TOO_LONG)
            return None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        caller = await self._context.authenticate(Scope.SUBMIT)
        submission = Submission(
            items=[Item(index, line) for index, line in enumerate(lines)],
            model=str(self._model.value),
            parameters=self._parameters(),
            managed=Managed(name=self._job_name()),
            api_key_id=caller.key_id,
        )
        services = self._context.services
        return await run_write(
            create_job, submission, database=services.database, notify=services.notify, settings=services.settings
        )

    async def _submit_file(self) -> str | None:
        """Let the browser upload the chosen file; return the id of its job, None if it was refused."""
        fields = {"model": str(self._model.value), **self._parameters(), **_given(name=self._job_name())}
        reply = await ui.run_javascript(
            _SEND
            % {
                "input": json.dumps(self._file.html_id),
                "bar": json.dumps(self._bar.html_id),
                "path": json.dumps(f"{SUBMIT_PATH}?{urlencode(fields)}"),
                "table": json.dumps("This is a table. Run: basic submit FILE --prompt-column COLUMN"),
            },
            timeout=_UPLOAD_S,
        )
        if "id" in reply:
            return str(reply["id"])
        self._problem.set_text(html.safe(str(reply.get("error"))))
        return None

    def _parameters(self) -> dict[str, float]:
        trees = {"record_trees": _TREE_STEPS} if self._trees.value else {}
        return {"max_tokens": int(self._tokens.value or 1), "temperature": float(self._heat.value or 0), **trees}

    def _job_name(self) -> str | None:
        return (self._name.value or "").strip() or None


def _given(**fields: Any) -> Mapping[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _javascript_length(text: str) -> int:
    """Return the length of a text in UTF-16 code units, as JavaScript and `maxlength` count it."""
    return len(text.encode("utf-16-le", errors="surrogatepass")) // 2
