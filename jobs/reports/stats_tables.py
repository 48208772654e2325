"""What `basic stats` prints: the numbers of a job, or of everything, as tables for people.

Takes statistics as `/stats` tells them; fetches nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.control_characters import safe

Numbers = Mapping[str, Any]
Columns = Sequence[tuple[str, str, Callable[[Any], str]]]  # heading, field, how it is written

_NORMAL_95: Final = 1.96
_MOST_ROWS: Final = 12


def stats_tables(numbers: Numbers) -> RenderableType:
    """Return everything worth a look: the sums first, then where they come from."""
    parts: list[RenderableType] = [_summary(numbers)]
    for title, field, columns in _TABLES:
        rows = numbers.get(field) or []
        if rows:
            parts += [Text(), Text(title, "bold"), _table(_spread(rows), columns)]
    return Group(*parts)


def speedup_text(numbers: Numbers) -> str:
    """Return the speed-up with its uncertainty and what the plain steps say about it."""
    speedup = numbers.get("speedup")
    if speedup is None:
        return "not measured"
    text = times_text(speedup, numbers.get("speedup_error"))
    check, plain_steps = numbers.get("plain_check"), numbers.get("plain_steps", 0)
    if check is None:
        return f"{text} (by the calibrated time of plain steps; no plain step checked it)"
    return f"{text} (by {plain_steps} plain steps of these jobs: {speedup * check:.2f}x)"


def comparison_text(comparison: Numbers) -> str:
    """Return what came of decoding some requests both ways, with its uncertainty, and every fault."""
    if not comparison["done"]:
        return f"{comparison['requests_asked']} requests wait for a worker that is idle"
    if comparison.get("error_code"):
        return f"given up, {comparison['error_code']}: {comparison['error_message']}"
    texts = f"{comparison['requests']} requests decoded both ways"
    if comparison["faults"]:
        texts += f"; {comparison['faults']} of them with ANOTHER TEXT, which is a fault"
    if comparison["speedup"] is None:
        return f"not measured ({texts})"
    batch = f"{comparison['mean_batch_sequences']:.1f} at a time"
    return f"{times_text(comparison['speedup'], comparison['speedup_error'])} ({texts}, {batch})"


def times_text(speedup: float, error: float | None) -> str:
    """Return a speed-up with its uncertainty."""
    return f"{speedup:.2f}x" + ("" if error is None else f" ± {_NORMAL_95 * error:.2f}")


def _summary(numbers: Numbers) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in summary_rows(numbers):
        grid.add_row(Text(name, "bold"), Text(value, overflow="fold"))
    return grid


def summary_rows(numbers: Numbers) -> Iterable[tuple[str, str]]:
    """Yield the sums as names and values."""
    completed, failed, total = (numbers[f"requests_{name}"] for name in ("completed", "failed", "total"))
    yield "requests", f"{completed:,d} completed, {failed:,d} failed, {total:,d} in all"
    yield "tokens", f"{numbers['completion_tokens']:,d} written, {numbers['prompt_tokens']:,d} read"
    yield "tokens/s", _number(numbers.get("tokens_per_s"), ".1f", f" over {numbers['wall_s']:,.1f} s")
    yield "speed-up over plain", speedup_text(numbers)
    if numbers.get("comparison") is not None:
        yield "compared with plain", comparison_text(numbers["comparison"])
    yield "tokens per step", _number(numbers.get("mean_acceptance_length"), ".2f")
    yield "expected, accepted", _expected(numbers)
    yield "draft nodes per step", _number(numbers.get("mean_tree_nodes"), ".2f")
    yield "time of steps", _phases(numbers)
    if numbers.get("tokens_per_joule") is not None:
        yield "tokens per joule", _number(numbers["tokens_per_joule"], ".3f")


def _expected(numbers: Numbers) -> str:
    if numbers.get("mean_expected") is None:
        return "not measured"
    off = numbers.get("miscalibration")
    text = f"{numbers['mean_expected']:.2f}, {numbers['mean_accepted']:.2f} draft tokens a step"
    return text + ("" if off is None else f"; off by {off:.0%} where there was a tree")


def _phases(numbers: Numbers) -> str:
    draft, verify = numbers.get("draft_share"), numbers.get("verify_share")
    if draft is None or verify is None:
        return "not measured"
    return f"{draft:.0%} draft, {verify:.0%} verify, {max(0.0, 1 - draft - verify):.0%} host"


def _spread(rows: Sequence[Any]) -> list[Any]:
    """Return so few of the rows that they fit a screen, from first to last."""
    if len(rows) <= _MOST_ROWS:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (_MOST_ROWS - 1))] for place in range(_MOST_ROWS)]


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
    return "" if value is None else f"{value:.2f}x"


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
