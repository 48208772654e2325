"""The tables of `basic stats`, from the JSON of `/v1/stats`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.control_characters import safe
from jobs.reports.chart_data import phase_shares, spread
from jobs.reports.speedup import basis_text, check_text, speedup_text

Statistics = Mapping[str, Any]
Columns = Sequence[tuple[str, str, Callable[[Any], str]]]  # heading, field, formatter

_MAX_ROWS: Final = 12  # of a table, so that all fit on a screen


def stats_tables(statistics: Statistics) -> RenderableType:
    """Return the totals, and below them one table per breakdown."""
    parts: list[RenderableType] = [_summary(statistics)]
    for title, field, columns in _TABLES:
        rows = statistics.get(field) or []
        if rows:
            parts += [Text(), Text(title, "bold"), _table(spread(rows, _MAX_ROWS), columns)]
    return Group(*parts)


def _summary(statistics: Statistics) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in summary_rows(statistics):
        grid.add_row(Text(name, "bold"), Text(value, overflow="fold"))
    return grid


def summary_rows(statistics: Statistics) -> Iterable[tuple[str, str]]:
    """Yield the totals as names and values."""
    completed, failed, total = (statistics[f"requests_{name}"] for name in ("completed", "failed", "total"))
    yield "requests", f"{completed:,d} completed, {failed:,d} failed, {total:,d} in all"
    yield "tokens", f"{statistics['completion_tokens']:,d} written, {statistics['prompt_tokens']:,d} read"
    if statistics.get("requests_cached"):
        tokens = statistics["cached_prompt_tokens"] + statistics["cached_completion_tokens"]
        yield "cached", f"{statistics['requests_cached']:,d} requests, {tokens:,d} tokens: not in the lines below"
    yield "tokens/s", _number(statistics.get("tokens_per_s"), ".1f", f" over {statistics['wall_s']:,.1f} s")
    yield "speed-up over plain", _speedup(statistics)
    if statistics.get("comparison") is not None:
        yield "compared with plain", _speedup_check(statistics["comparison"])
    yield "tokens per step", _number(statistics.get("mean_acceptance_length"), ".2f")
    yield "expected, accepted", _expected(statistics)
    yield "draft nodes per step", _number(statistics.get("mean_tree_nodes"), ".2f")
    yield "time of steps", _phases(statistics)
    if statistics.get("tokens_per_joule") is not None:
        yield "tokens per joule", _number(statistics["tokens_per_joule"], ".3f")


def _speedup(statistics: Statistics) -> str:
    speedup = statistics.get("speedup")
    if speedup is None:
        return speedup_text(None)
    basis = basis_text(speedup, statistics.get("plain_check"), statistics.get("plain_steps", 0))
    return f"{speedup_text(speedup, statistics.get('speedup_error'))} ({basis})"


def _speedup_check(check: Statistics) -> str:
    fields = ("requests_asked", "requests", "done", "faults", "error_code", "error_message", "mean_batch_sequences")
    values: dict[str, Any] = {name: check.get(name) for name in fields}
    state = check_text(**values)
    if not check["done"] or check.get("error_code"):
        return state
    return f"{speedup_text(check['speedup'], check['speedup_error'])} ({state})"


def _expected(statistics: Statistics) -> str:
    if statistics.get("mean_expected") is None:
        return "not measured"
    off = statistics.get("miscalibration")
    text = f"{statistics['mean_expected']:.2f}, {statistics['mean_accepted']:.2f} draft tokens a step"
    return text + ("" if off is None else f"; off by {off:.0%} where there was a tree")


def _phases(statistics: Statistics) -> str:
    draft, verify = statistics.get("draft_share"), statistics.get("verify_share")
    if draft is None or verify is None:
        return "not measured"
    return ", ".join(f"{share:.0%} {phase}" for phase, share in phase_shares(draft, verify))


def _table(rows: Iterable[Mapping[str, Any]], columns: Columns) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading, _, _ in columns:
        table.add_column(heading, justify="left" if heading in ("draft", "decision") else "right")
    for row in rows:
        table.add_row(*(Text(form(row[field])) for _, field, form in columns))
    return table


def _number(value: Any, form: str, unit: str = "") -> str:
    return "not measured" if value is None else format(value, form) + unit


def _count(value: Any) -> str:
    return f"{value:,d}"


def _two(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: Any) -> str:
    return f"{value:.1%}"


def _times(value: Any) -> str:
    return speedup_text(value, missing="")


def _word(value: Any) -> str:
    return safe(str(value)) or "none"


_TABLES: Final[Sequence[tuple[str, str, Columns]]] = (
    (
        "By draft",
        "drafters",
        (
            ("draft", "drafter", _word),
            ("steps", "steps", _count),
            ("nodes", "mean_tree_nodes", _two),
            ("accepted", "mean_accepted", _two),
            ("speed-up", "speedup", _times),
        ),
    ),
    (
        "By decision",
        "decisions",
        (
            ("decision", "decision", _word),
            ("steps", "steps", _count),
            ("share", "share", _percent),
            ("speed-up", "speedup", _times),
        ),
    ),
    (
        "By depth of the tree",
        "acceptance_by_depth",
        (("depth", "depth", _count), ("tried", "tried", _count), ("accepted", "rate", _percent)),
    ),
    (
        "By rank of the child",
        "acceptance_by_rank",
        (("rank", "child_rank", _count), ("tried", "tried", _count), ("accepted", "rate", _percent)),
    ),
    (
        "By batch size",
        "batch_sizes",
        (
            ("sequences", "batch_sequences", _count),
            ("steps", "steps", _count),
            ("nodes", "mean_tree_nodes", _two),
            ("tokens a step", "mean_emitted_per_step", _two),
            ("step ms", "mean_step_ms", _two),
        ),
    ),
)
