"""Render jobs in a terminal: progress, text as it is generated, and tables.

Model text is untrusted: control characters never reach the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from jobs.client.durations import age_text, duration_text, local_time
from jobs.client.outcome import completed_with_failures, job_status_text
from jobs.client.results import Choice, JobInfo, Statistics
from jobs.control_characters import safe
from jobs.messages import PartialEvent, Piece, Priority
from jobs.reports.speedup import speedup_text

STYLES = {"draft": "green", "target": "magenta"}  # accepted draft tokens, tokens of the target itself

_RESERVED_ROWS = 6  # of the screen, for the progress bar and scrolled text
_NAME_CHARS = 24
_ID_CHARS = 38
_SHORT_ID_CHARS = 14
_NUMBER_COLUMNS = ("requests", "tokens")
_MIN_MODEL_CHARS = 4
_WHOLE_ID_WIDTH = 110  # terminal columns from which whole ids fit
_BAR_WIDTH = 24
_FILE_WIDTH = 160  # columns when the output is not a terminal


@dataclass(frozen=True, slots=True)
class ChoiceText:
    """The text of one choice so far."""

    name: str
    pieces: tuple[Piece, ...] = ()
    tokens: int = 0
    accepted: int = 0
    ended: bool = False
    finish_reason: str | None = None
    error: str | None = None

    def after(self, event: PartialEvent) -> ChoiceText:
        """Return the choice after an event. A snapshot replaces the text, other events append to it."""
        start = ChoiceText(self.name) if event.snapshot else self
        return ChoiceText(
            name=self.name,
            pieces=start.pieces + _pieces(event),
            tokens=start.tokens + event.tokens,
            accepted=start.accepted + event.accepted,
            ended=event.type in ("finished", "failed"),
            finish_reason=event.finish_reason,
            error=safe(str((event.error or {}).get("message", "failed"))) if event.type == "failed" else None,
        )

    def rich_text(self) -> Text:
        """Return the text, each piece in the colour of its source."""
        text = Text()
        for piece in self.pieces:
            text.append(safe(piece.text), STYLES[piece.source])
        return text

    def tail(self, chars: int) -> Text:
        """Return the end of the text on one line."""
        text = Text()
        for piece in self.pieces[-chars:]:  # a piece has at least one character
            text.append(safe(piece.text).replace("\n", " "), STYLES[piece.source])
        return text[-chars:] if len(text) > chars else text


class Transcript:
    """The texts of all choices of a job so far."""

    def __init__(self) -> None:
        self._choices: dict[tuple[int, int], ChoiceText] = {}
        self._open: dict[int, int] = {}  # request index -> running choices

    def add(self, event: PartialEvent) -> ChoiceText | None:
        """Apply an event; return its choice if the event ended it."""
        if event.index is None:
            return None
        key = (event.index, event.choice)
        before = self._choices.get(key)
        if before is None:
            before = ChoiceText(_name(event))
            self._open[event.index] = self._open.get(event.index, 0) + 1
        after = self._choices[key] = before.after(event)
        if not after.ended or before.ended:
            return None
        self._open[event.index] = 0 if event.type == "failed" else self._open[event.index] - 1
        return after

    @property
    def ended_requests(self) -> int:
        """Number of requests whose choices have all ended."""
        return sum(1 for left in self._open.values() if left == 0)

    @property
    def tokens(self) -> int:
        """Number of tokens of all choices."""
        return sum(choice.tokens for choice in self._choices.values())

    @property
    def running(self) -> Iterator[ChoiceText]:
        """The choices of which some text has arrived, but not the end."""
        choices = ((self._open[index], choice) for (index, _), choice in self._choices.items())
        return (choice for left, choice in choices if left > 0 and not choice.ended)


class JobDisplay(Protocol):
    """Shows the text of a job while it runs, on a terminal or as lines."""

    def __enter__(self) -> Self:
        """Start to show the job."""

    def __exit__(self, *exc: object) -> None:
        """Stop and restore the screen."""

    def show(self, event: PartialEvent) -> None:
        """Show the change that an event makes."""


def make_console() -> Console:
    """Return a console for standard output."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def make_view(console: Console, info: JobInfo) -> JobDisplay:
    """Return a live view for a terminal, and plain lines for other outputs."""
    return LiveView(console, info) if console.is_terminal else PlainView(console, info)


class LiveView:
    """A progress bar below the running texts; ended texts scroll up in full."""

    def __init__(self, console: Console, info: JobInfo) -> None:
        self._console = console
        self._transcript = Transcript()
        self._progress = _progress_bar(console)
        self._task = self._progress.add_task("", total=info.request_counts.total, tokens=0)
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> Self:
        self._console.print(_legend())
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, event: PartialEvent) -> None:
        """Apply an event. The screen refreshes 8 times per second."""
        ended = self._transcript.add(event)
        if ended is not None:
            self._live.console.print(_ended_block(ended))
        done = self._transcript.ended_requests
        self._progress.update(self._task, completed=done, tokens=self._transcript.tokens)

    def _render(self) -> RenderableType:
        width, height = self._console.size
        rows = Table.grid(padding=(0, 1))
        for choice, _ in zip(self._transcript.running, range(max(1, height - _RESERVED_ROWS)), strict=False):
            rows.add_row(Text(choice.name, "bold"), choice.tail(max(10, width - _NAME_CHARS - 4)))
        return Group(rows, self._progress)


class PlainView:
    """One block of uncoloured lines per ended choice."""

    def __init__(self, console: Console, info: JobInfo) -> None:
        self._console = console
        self._total = info.request_counts.total
        self._transcript = Transcript()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, event: PartialEvent) -> None:
        """Print the choice if the event ended it."""
        ended = self._transcript.add(event)
        if ended is not None:
            count = f"[{self._transcript.ended_requests}/{self._total}]"
            _print_plain(self._console, f"{count} {_headline(ended)}")
            _print_plain(self._console, ended.rich_text().plain)


def closing_table(info: JobInfo, statistics: Statistics, database: str | None) -> Table:
    """Return the table shown after a job: counts, tokens, speed and speed-up."""
    counts = info.request_counts
    rows: dict[str, str | Text] = {
        "job": Text.assemble(f"{info.id} (", status_text(info), ")"),
        "requests": f"{counts.completed} completed, {counts.failed} failed, {counts.total} in all",
        **_cached(info),
        "tokens": _number(statistics.get("completion_tokens"), ",d"),
        "tokens/s": _number(statistics.get("tokens_per_s"), ".1f"),
        "mean acceptance length": _number(statistics.get("mean_acceptance_length"), ".2f", " tokens per step"),
        "speed-up over plain": _speedup(statistics),
        "database": database or "on the server",
    }
    return _grid(rows.items())


def status_table(info: JobInfo, now: float) -> Table:
    """Return the progress of a job, one name and value per line. Times are in this machine's time zone."""
    counts, progress = info.request_counts, info.progress
    rows: dict[str, str | Text] = {
        "job": info.id,
        **({} if info.name is None else {"name": safe(info.name)}),
        "status": status_text(info),
        "model": f"{info.model}, {info.endpoint}",
        "submitted": f"{local_time(info.created_at)}, {age_text(info.created_at, now)}",
        "requests": f"{counts.completed:,d} completed, {counts.failed:,d} failed, {counts.total:,d} in all",
        **_cached(info),
        "tokens": f"{progress.completion_tokens:,d} written, {progress.prompt_tokens:,d} read",
        "tokens/s": _number(progress.tokens_per_s, ",.1f", f" over {duration_text(progress.elapsed_s)}"),
    }
    if not info.status.final:
        left_s = progress.time_left_s
        rows["time left"] = "unknown" if left_s is None else f"about {duration_text(left_s)}"
        rows["expires"] = "never" if info.expires_at is None else local_time(info.expires_at)
    if info.sampling_defaults:
        values = ", ".join(f"{name} {value:g}" for name, value in info.sampling_defaults.items())
        rows["sampling"] = f"{values}, from the model's generation config"
    if info.retry_of is not None:
        rows["retry of"] = info.retry_of
    if info.metadata:
        rows["labels"] = ", ".join(f"{safe(name)}={safe(value)}" for name, value in info.metadata.items())
    if info.priority is not Priority.NORMAL:
        rows["priority"] = info.priority
    if info.max_concurrent is not None:
        rows["at most"] = f"{info.max_concurrent:,d} requests at once"
    if info.paused_at is not None:
        rows["paused"] = f"{local_time(info.paused_at)}, {age_text(info.paused_at, now)}{_pause_reason(info)}"
    return _grid(rows.items())


def _cached(info: JobInfo) -> dict[str, str | Text]:
    """Return the row about copied answers; none where there are none."""
    cached, tokens = info.progress.requests_cached, info.progress.cached_tokens
    return {"cached": f"{cached:,d} requests, {tokens:,d} tokens"} if cached else {}


def jobs_table(jobs: Sequence[JobInfo], width: int, now: float) -> Table:
    """Return one row per job. A narrow window shows unique id prefixes, which commands accept."""
    chars = _ID_CHARS if width >= _WHOLE_ID_WIDTH else _unique_prefix_chars([job.id for job in jobs])
    lines: list[tuple[Text, ...]] = [_job_cells(job, chars, now) for job in jobs]
    headings = ["job", "status", "requests", "tokens", "submitted", "model"]
    if any(job.name for job in jobs):
        headings.insert(1, "name")
        lines = [(cells[0], Text(_short(job.name)), *cells[1:]) for job, cells in zip(jobs, lines, strict=True)]
    *fixed, _ = (max(map(len, cells)) for cells in zip(headings, *lines, strict=True))
    columns = [
        Column(name, no_wrap=True, min_width=chars, justify="right" if name in _NUMBER_COLUMNS else "left")
        for name, chars in zip(headings, fixed, strict=False)
    ]
    rest = max(_MIN_MODEL_CHARS, width - sum(fixed) - 2 * len(fixed))  # two spaces between columns
    table = Table(*columns, Column("model", no_wrap=True, max_width=rest), box=None, pad_edge=False)
    for cells in lines:
        table.add_row(*cells)
    return table


def _job_cells(job: JobInfo, chars: int, now: float) -> tuple[Text, ...]:
    counts = job.request_counts
    status = status_text(job)
    if counts.failed and not completed_with_failures(job.status, counts.failed):
        status.append(f", {counts.failed} failed")
    rest = (
        f"{counts.ended}/{counts.total}",
        str(job.progress.completion_tokens),
        age_text(job.created_at, now),
        safe(job.model),
    )
    return (Text(job.id[:chars]), status, *map(Text, rest))


def _pause_reason(info: JobInfo) -> str:
    """Return why the service paused a job, and what to do; empty if a caller did."""
    budget, resume = info.budget, f"basic resume {info.id}"
    if info.pause_reason == "pilot":
        return f": its pilot has ended. See: basic estimate --job {info.id}    Run the rest: {resume}"
    if info.pause_reason == "budget_tokens" and budget is not None and budget.tokens is not None:
        return f": its budget of {budget.tokens:,} tokens is spent. Raise it: {resume} --budget-tokens N"
    if info.pause_reason == "budget_seconds" and budget is not None and budget.seconds is not None:
        return f": its budget of {budget.seconds:,g} seconds is spent. Raise it: {resume} --budget-seconds N"
    return "" if info.pause_reason in (None, "user") else f", because: {safe(info.pause_reason)}"


def _short(name: str | None) -> str:
    shown = safe(name or "")
    return shown if len(shown) <= _NAME_CHARS else shown[: _NAME_CHARS - 1] + "…"


def _unique_prefix_chars(ids: Sequence[str]) -> int:
    """Return how many characters make the prefixes of all ids unique."""
    chars = _SHORT_ID_CHARS
    while chars < _ID_CHARS and len({job_id[:chars] for job_id in ids}) < len(ids):
        chars += 1
    return chars


def keys_table(keys: Iterable[Mapping[str, Any]]) -> Table:
    """Return one row per API key."""
    identity = Column("id", no_wrap=True, min_width=_KEY_ID_CHARS)  # never cut, so that it can be copied
    name = Column("name", overflow="fold")
    table = Table(identity, name, "scopes", "state", "limits", box=None, pad_edge=False)
    for key in keys:
        limits = ", ".join(f"{key[limit]:,d} {unit}" for limit, unit in _LIMITS.items() if key[limit] is not None)
        kept = ", ".join(f"{name} {age_s / 86_400:g} d" for name, age_s in key["kept_s"].items())
        limits = f"{limits}; keeps {kept}".removeprefix("; ") if kept else limits
        table.add_row(key["id"], Text(safe(key["name"])), ", ".join(key["scopes"]), _key_state(key), limits or "none")
    return table


def _key_state(key: Mapping[str, Any]) -> str:
    if not key["opens"]:
        return "revoked" if key["revoked_at"] is not None else "expired"
    return "works" if key["expires_at"] is None else f"works until {local_time(key['expires_at'])[:10]}"


_KEY_ID_CHARS = 20
_LIMITS = {
    "max_requests_queued": "requests queued",
    "max_tokens_queued": "tokens queued",
    "requests_per_minute": "requests per minute",
}


def findings_table(findings: Iterable[tuple[str, str, str, str]]) -> Table:
    """Return the findings of the doctor, each (part, status, message, advice), with the advice below the message."""
    table = Table.grid(padding=(0, 2))
    for part, status, message, advice in findings:
        cell = Text(safe(message), overflow="fold")
        if advice:
            cell.append(f"\n→ {safe(advice)}", "bold")
        table.add_row(Text(status, _STATUS_STYLES.get(status, "")), Text(part, "bold"), cell)
    return table


def reference_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of names, such as settings, and what is known about each."""
    table = Table(Column(columns[0], no_wrap=True), *columns[1:], box=None, pad_edge=False)
    for name, *cells in rows:
        table.add_row(Text(name, "bold"), *(Text(cell, overflow="fold") for cell in cells))
    return table


_STATUS_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}


def choice_lines(choice: Choice) -> Iterator[str]:
    """Yield the lines of a choice: its answer, and each call as `name(arguments)`."""
    if not choice.answer and not choice.tool_calls and choice.reasoning_content is not None:
        yield "(only reasoning: see --json)"
    elif choice.answer or not choice.tool_calls:
        yield safe(choice.answer)
    for call in choice.tool_calls:
        yield safe(f"{call.function.name}({call.function.arguments})")


def numerics_lines(texts: Mapping[str, int]) -> Iterator[str]:
    """Yield what fixed the bits of texts: how many have which fingerprints, and what several of one text mean."""
    if texts:
        yield f"Numerics: {', '.join(f'{safe(name)} ({count:,d})' for name, count in texts.items())}"
    resumed = sum(count for name, count in texts.items() if "," in name)
    if resumed:
        yield f"{resumed:,d} of these texts were resumed where other bits are possible: docs/exactness.md"


def status_text(info: JobInfo) -> Text:
    """Return the status of a job; yellow if requests of a completed job failed."""
    return Text(
        job_status_text(info), "yellow" if completed_with_failures(info.status, info.request_counts.failed) else ""
    )


def _grid(rows: Iterable[tuple[str, str | Text]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, "bold"), value if isinstance(value, Text) else Text(value, overflow="fold"))
    return table


def _progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(_BAR_WIDTH),
        MofNCompleteColumn(),
        TextColumn("requests · {task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
    )


def _legend() -> Text:
    return Text.assemble(("accepted draft tokens", STYLES["draft"]), " · ", ("target's own tokens", STYLES["target"]))


def _ended_block(choice: ChoiceText) -> RenderableType:
    return Group(Text(_headline(choice), "bold" if choice.error is None else "bold red"), choice.rich_text(), Text())


def _headline(choice: ChoiceText) -> str:
    if choice.error is not None:
        return f"{choice.name}: {choice.error}"
    return f"{choice.name} ({choice.tokens} tokens, {choice.accepted} from the draft, {choice.finish_reason})"


def _name(event: PartialEvent) -> str:
    name = safe(event.request or f"request-{event.index}")
    name = name if len(name) <= _NAME_CHARS else name[: _NAME_CHARS - 1] + "…"
    return f"{name} #{event.choice}" if event.choice else name


def _pieces(event: PartialEvent) -> tuple[Piece, ...]:
    if event.pieces or not event.text:
        return event.pieces
    return (Piece(text=event.text, source="target"),)


def _print_plain(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)


def _speedup(statistics: Statistics) -> str:
    speedup = statistics.get("speedup")
    if speedup is None:
        return "not measured"
    source = statistics.get("speedup_source")
    return f"{speedup_text(speedup)}, measured on this machine" + (f" ({source})" if source else "")


def _number(value: Any, form: str, unit: str = "") -> str:
    return "not measured" if value is None else format(value, form) + unit
