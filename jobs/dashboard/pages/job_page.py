"""The page of one job: progress, texts as they are generated, requests and errors, draft trees, statistics.

Only the open tab is read and updated, and only changed elements are sent, so that a reader keeps the scroll position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.dashboard import charts, html
from jobs.dashboard.job_header import JobHeader
from jobs.dashboard.layout import box, frame, heading, legend, link
from jobs.dashboard.pages.pilot_estimate import PilotEstimate
from jobs.dashboard.pages.verification_tab import VerificationTab
from jobs.dashboard.session import BASE, PageContext
from jobs.dashboard.stats_view import StatsView, table
from jobs.dashboard.status import show_status
from jobs.keys import Scope
from jobs.messages import JobStatus
from storage import job_details, queries, statistics
from storage.job_details import ChoiceDetails, ErrorCount, RequestDetails, TreeDetails, TreeKey
from storage.queries import JobView
from storage.statuses import ERROR_REQUEST_STATUSES

_REFRESH_S: Final = 1.0
_TICKS: Final = {
    "Requests": 2,
    "Trees": 5,
    "Statistics": 4,
    "Verification": 1,
}  # seconds between updates of a tab while the job runs
_TICKS_ENDED: Final = 10  # seconds after its end, when speed-up checks may still change it
_STREAMS: Final = 6  # running requests to show
_PAGE: Final = 20
_MESSAGE_CHARS: Final = 200
_DELETED: Final = "This job has been deleted."
_GRAMMARS: Final = {  # kinds of grammars, by their name in a stored request
    "json_schema": "a JSON schema",
    "json_object": "JSON: one object",
    "regex": "an expression",
    "choice": "a list of choices",
    "grammar": "a grammar",
}
_FILTERS: Final = {
    "All": (),
    "Completed": ("completed",),
    "Failed": ERROR_REQUEST_STATUSES,
    "Running": ("running",),
    "Waiting": ("queued",),
}


async def build(context: PageContext, caller: Caller, job_id: str) -> None:
    """Build the page of a job; for an id that the caller can't see, a link to the list."""
    job = await context.read(lambda session: queries.job(session, job_id, caller.sees))
    with frame("Job", context):
        if job is None:
            heading("No such job", 1)
            with link(f"{BASE}/"):
                ui.label("All jobs")
            return
        page = JobDetailPage(context, caller, job, may_submit=await context.may(Scope.SUBMIT))
        ui.timer(_REFRESH_S, page.refresh)  # show the page before its tabs are filled


class JobDetailPage:
    """Header and tabs of one job."""

    def __init__(self, context: PageContext, caller: Caller, job: JobView, *, may_submit: bool) -> None:
        self._context = context
        self._caller = caller
        self._job = job
        self._gone = ui.label(_DELETED).props('role="alert"')
        self._gone.set_visibility(False)
        with ui.element("div").classes("stack").style("gap:1rem") as self._content:
            self._lay_out(job, may_submit=may_submit)
        self._numbers: StatsView | None = None  # created when its tab is first opened
        self._head.show(job)
        self._ticks = 0  # seconds until the open tab is updated

    def _lay_out(self, job: JobView, *, may_submit: bool) -> None:
        context = self._context
        self._head = JobHeader(context, job, self.refresh, may_submit=may_submit)
        self._estimate = PilotEstimate(context)
        self._live = LiveTab()
        self._requests = RequestsTab(context, job.id)
        self._trees = TreesTab(context, job.id)
        self._verifications = VerificationTab(context, self._caller, may_submit=may_submit)
        with ui.tabs().props('align="left" no-caps inline-label outside-arrows mobile-arrows') as tabs:
            live, asked = ui.tab("Live"), ui.tab("Requests")
            drawn, counted = ui.tab("Trees"), ui.tab("Statistics")
            verified = None if job.verification_of is not None else ui.tab("Verification")
        first = live if not JobStatus(job.status).final else asked
        with (
            ui.tab_panels(tabs, value=first, animated=False)
            .props("keep-alive")
            .style("background:transparent;width:100%")
        ):
            with ui.tab_panel(live):
                self._live.lay_out()
            with ui.tab_panel(asked):
                self._requests.lay_out()
            with ui.tab_panel(drawn):
                self._trees.lay_out()
            with ui.tab_panel(counted):
                self._stats_panel = ui.element("div").classes("stack")
            if verified is not None:
                with ui.tab_panel(verified):
                    self._verifications.lay_out(job)
        self._tabs = tabs
        tabs.on_value_change(self._fill_open_tab)

    async def refresh(self) -> None:
        """Update the header and the open tab."""
        job = await self._context.read(lambda session: queries.job(session, self._job.id, self._caller.sees))
        self._gone.set_visibility(job is None)
        self._content.set_visibility(job is not None)
        if job is None:
            return
        ended_now = JobStatus(job.status).final and not JobStatus(self._job.status).final
        self._job = job
        self._ticks -= 1
        self._head.show(job)
        await self._estimate.show(job)
        name = self._tab()
        if name == "Live":
            running = await self._context.read(lambda session: job_details.running(session, job.id, _STREAMS))
            self._live.show(running, job)
        elif ended_now or self._ticks <= 0:
            await self._fill(name)

    def _tab(self) -> str:
        value = self._tabs.value
        return value if isinstance(value, str) else str(getattr(value, "_props", {}).get("name", ""))

    async def _fill_open_tab(self) -> None:
        await self._fill(self._tab())

    async def _fill(self, name: str) -> None:
        self._ticks = _TICKS_ENDED if JobStatus(self._job.status).final else _TICKS.get(name, 0)
        if name == "Requests":
            await self._requests.show()
        elif name == "Trees":
            await self._trees.show()
        elif name == "Statistics":
            job_id = self._job.id
            numbers = await self._context.read(lambda session: statistics.job_stats(session, job_id))
            if self._numbers is None:
                with self._stats_panel:
                    self._numbers = StatsView()
            self._numbers.show(numbers)
        elif name == "Verification":
            self._ticks = _TICKS[name]  # it runs after the job has ended
            await self._verifications.show(self._job)


class LiveTab:
    """The texts of running requests, with accepted draft tokens marked."""

    def __init__(self) -> None:
        self._shown: list[int] = []
        self._texts: dict[tuple[int, int], ui.html] = {}

    def lay_out(self) -> None:
        """Add empty elements; `show` fills them."""
        with ui.element("div").classes("stack"):
            legend()
            self._note = ui.label().classes("dim").props('role="status"')
            self._cards = ui.element("div").classes("stack")

    def show(self, running: list[RequestDetails], job: JobView) -> None:
        """Show the committed texts."""
        self._note.set_text(self._note_text(running, job))
        keys = [request.request_index for request in running]
        if keys != self._shown or any(
            (r.request_index, c.choice_index) not in self._texts for r in running for c in r.choices
        ):
            self._shown = keys
            self._texts = {}
            self._cards.clear()
            with self._cards:
                for request in running:
                    self._card(request)
        for request in running:
            for choice in request.choices:
                self._texts[request.request_index, choice.choice_index].set_content(html.colored(choice.pieces))

    @staticmethod
    def _note_text(running: list[RequestDetails], job: JobView) -> str:
        if JobStatus(job.status).final:
            return "The job has ended. See Requests for its texts."
        return "" if running else "No request is running."

    def _card(self, request: RequestDetails) -> None:
        with box():
            request_head(request)
            with beside_prompt(request):
                for choice in request.choices:
                    self._texts[request.request_index, choice.choice_index] = ui.html("", sanitize=False)


@contextmanager
def beside_prompt(request: RequestDetails) -> Iterator[None]:
    """Put the elements of the block beside the prompt of a request; on a phone below it."""
    with ui.element("div").classes("pair"):
        ui.html(f"<bdi>{html.plain(request.prompt)}</bdi>", sanitize=False).classes("dim small prompt")
        with ui.element("div").classes("stack"):
            yield


def request_head(request: RequestDetails) -> None:
    """Add id and status of a request, and what binds its text."""
    with ui.element("div").classes("line"):
        with ui.element("h2").classes("grow"):
            ui.html(f"<bdi>{html.plain(request.custom_id)}</bdi>", sanitize=False).style("overflow-wrap:anywhere")
        show_status(ui.label(), request.status)
    if request.grammar is not None:
        ui.label(f"Bound by {_GRAMMARS.get(request.grammar, request.grammar)}").classes("dim small")


class RequestsTab:
    """The requests of a job, paged, and a table of their errors."""

    def __init__(self, context: PageContext, job_id: str) -> None:
        self._context = context
        self._job_id = job_id
        self._after = [-1]  # for each page up to this one: the index before its first request
        self._shown: dict[int, tuple[ui.element, RequestDetails]] = {}
        self._errors_shown: list[ErrorCount] = []

    def lay_out(self) -> None:
        """Add empty elements; `show` fills them."""
        with ui.element("div").classes("stack"):
            self._errors = ui.element("div").classes("stack")
            self._which = ui.toggle(list(_FILTERS), value="All", on_change=self._first_page).props("no-caps unelevated")
            legend()
            self._none = ui.label("No requests.").classes("dim")
            self._none.set_visibility(False)
            self._cards = ui.element("div").classes("stack")
            with ui.element("div").classes("line"):
                self._back = ui.button("Back", on_click=self._page_back).props("flat no-caps")
                self._next = ui.button("Next", on_click=self._page_on).props("flat no-caps")
        self._last = -1

    async def show(self) -> None:
        """Read a page of requests and show it."""
        asked = self._asked()
        statuses, after = asked
        found = await self._context.read(lambda s: job_details.requests(s, self._job_id, statuses, after, _PAGE + 1))
        errors = await self._context.read(lambda session: job_details.errors(session, self._job_id))
        if asked != self._asked():  # another page was requested meanwhile
            return
        self._show_errors(errors)
        self._show_requests(found[:_PAGE])
        self._none.set_visibility(not found)
        self._last = found[:_PAGE][-1].request_index if found else -1
        self._next.set_visibility(len(found) > _PAGE)
        self._back.set_visibility(len(self._after) > 1)

    def _asked(self) -> tuple[Sequence[str], int]:
        return _FILTERS[str(self._which.value)], self._after[-1]

    def _show_requests(self, requests: Sequence[RequestDetails]) -> None:
        if [request.request_index for request in requests] != list(self._shown):
            self._cards.clear()
            self._shown = {}
        for request in requests:
            card, shown = self._shown.get(request.request_index, (None, None))
            if request == shown:
                continue
            if card is None:
                with self._cards:
                    card = box()
            self._shown[request.request_index] = card, request
            card.clear()
            with card:
                self._fill_card(request)

    def _show_errors(self, errors: list[ErrorCount]) -> None:
        if errors == self._errors_shown:
            return
        self._errors_shown = errors
        self._errors.clear()
        if errors:
            with self._errors, box():
                heading("Errors")
                with ui.element("div").classes("wide"):
                    rows = [(_error_text(error), f"{error.requests:,d}") for error in errors]
                    table(("Error", "Requests"), rows)

    @staticmethod
    def _fill_card(request: RequestDetails) -> None:
        request_head(request)
        with beside_prompt(request):
            if request.error_message:
                ui.label(html.safe(request.error_message)).style("color:var(--bad);overflow-wrap:anywhere")
            for choice in request.choices:
                ui.html(html.colored(choice.pieces), sanitize=False)
                ui.label(_choice_text(choice)).classes("dim small")

    async def _first_page(self) -> None:
        self._after = [-1]
        await self.show()

    async def _page_on(self) -> None:
        self._after.append(self._last)
        await self.show()

    async def _page_back(self) -> None:
        self._after.pop()
        await self.show()


def _choice_text(choice: ChoiceDetails) -> str:
    end = f", ended by {choice.finish_reason}" if choice.finish_reason else ""
    numerics = f", numerics {choice.numerics}" if choice.numerics else ""
    return f"{choice.tokens:,d} tokens, {choice.accepted:,d} from the draft{end}{numerics}"


def _error_text(error: ErrorCount) -> str:
    message = "other messages" if error.message is None else html.safe(error.message)[:_MESSAGE_CHARS]
    return f"{error.code}: {message}"


class TreesTab:
    """The stored draft trees of a job, one at a time."""

    def __init__(self, context: PageContext, job_id: str) -> None:
        self._context = context
        self._job_id = job_id
        self._tree_keys: list[TreeKey] = []

    def lay_out(self) -> None:
        """Add empty elements; `show` fills them."""
        with ui.element("div").classes("stack"):
            self._none = ui.label(
                "This job has no draft trees. Submit with record_trees to store those of the first steps."
            ).classes("dim")
            with ui.element("div").classes("line") as self._choice:
                self._request = (
                    ui.select([], label="Text", on_change=self._show_steps)
                    .props("outlined dense")
                    .style("min-width:9rem")
                )
                self._step = (
                    ui.select([], label="Step", on_change=self._draw).props("outlined dense").style("min-width:17rem")
                )
            self._drawing = ui.element("div").classes("stack")

    async def show(self) -> None:
        """List the stored trees, and first draw the largest."""
        places = await self._context.read(lambda session: job_details.tree_keys(session, self._job_id))
        if places and places == self._tree_keys:
            return
        self._tree_keys = places
        self._none.set_visibility(not self._tree_keys)
        self._choice.set_visibility(bool(self._tree_keys))
        names = {(p.request_index, p.choice_index): _text_name(p) for p in self._tree_keys}
        if self._tree_keys and self._request.value is None:
            largest = max(self._tree_keys, key=lambda key: key.tree_nodes)
            self._request.set_options(names, value=(largest.request_index, largest.choice_index))
        elif self._tree_keys:  # its trees were all stored at once: keep the selected step
            self._request.set_options(names, value=self._request.value)

    async def _show_steps(self) -> None:
        places = [p for p in self._tree_keys if (p.request_index, p.choice_index) == self._request.value]
        if places:
            format = {p.step: f"Step {p.step}: {p.tree_nodes} nodes, {p.accepted_tokens} accepted" for p in places}
            largest = max(places, key=lambda key: key.tree_nodes)
            self._step.set_options(format, value=largest.step)
            await self._draw()

    async def _draw(self) -> None:
        if self._request.value is None or self._step.value is None:
            return
        request, choice = self._request.value
        key = TreeKey(request, choice, self._step.value)
        recorded = await self._context.read(lambda session: job_details.tree(session, self._job_id, key))
        self._drawing.clear()
        if recorded is not None:
            with self._drawing, box():
                _draw_tree(recorded)


def _text_name(key: TreeKey) -> str:
    return f"Request {key.request_index}" + (f", choice {key.choice_index}" if key.choice_index else "")


def _draw_tree(recorded: TreeDetails) -> None:
    ui.label(_step_text(recorded)).classes("small")
    path = "".join(text for *_, text, _, accepted in recorded.nodes[1:] if accepted)
    kept = f"<bdi class='mono by-draft'>{html.plain(path)}</bdi>" if path else "nothing"
    ui.html(
        f"After <bdi class='mono'>{html.plain(html.token(recorded.nodes[0][2]))}</bdi> the target accepted "
        f"{kept} and then sampled "
        f"<bdi class='mono'>{html.plain(html.token(recorded.bonus))}</bdi> itself.",
        sanitize=False,
    ).classes("small").style("overflow-wrap:anywhere")
    if len(recorded.nodes) == 1:
        ui.label("This step had no draft tokens.").classes("dim")
        return
    with ui.element("div").classes("wide").props('tabindex="0" role="group" aria-label="Drawing of the draft tree"'):
        ui.echart(charts.tree(recorded), renderer="svg").classes("draft-tree").style(
            f"height:{charts.tree_height(recorded)}px;width:100%"
        ).props('role="img" aria-label="Draft tree; its data is in the table below"')
    with ui.expansion("The tree as a table").props("dense").style("width:100%"), ui.element("div").classes("wide"):
        table(
            ("Token", "Parent", "Probability", "Accepted"),
            [_tree_line(recorded, node) for node in range(1, len(recorded.nodes))],
        )


def _step_text(recorded: TreeDetails) -> str:
    step = recorded.step
    expected = "" if step["expected_accepted"] is None else f", {step['expected_accepted']:.2f} expected"
    drafts = f"{step['tree_nodes']} draft nodes by {step['drafter'] or 'no drafter'}"
    batch = f"{step['batch_sequences']} sequences in the step, {step['step_ms']:.1f} ms"
    decision = f"decision: {step['decision'] or 'unknown'}"
    return f"{drafts}, {step['accepted_tokens']} accepted{expected}; {batch}; {decision}"


def _tree_line(recorded: TreeDetails, node: int) -> tuple[str, str, str, str]:
    parent, _, text, value, accepted = recorded.nodes[node]
    return html.token(text), html.token(recorded.nodes[parent][2]), f"{value:.3f}", "yes" if accepted else ""
