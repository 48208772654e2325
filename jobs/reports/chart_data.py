"""What each chart shows: title, axes and points, the same on the page, in the report and in `basic stats --plot`.

Pure. Takes statistics as the dataclass that storage reads, or as the JSON that the API returns: both have the same
field names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

MINUTE_S: Final = 60
_MIN_BUSY_S: Final = 1.0  # less work than this gives no reliable rate


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart and where its points come from: `fields` of the rows in `table`, a list in the statistics."""

    title: str
    x_name: str
    y_name: str
    table: str
    fields: tuple[str, ...]

    def rows(self, statistics: Any) -> list[tuple[Any, ...]]:
        """Return one tuple per row; None for a field that an older service does not send."""
        if isinstance(statistics, Mapping):
            return [tuple(map(row.get, self.fields)) for row in statistics[self.table]]
        return [tuple(getattr(row, name) for name in self.fields) for row in getattr(statistics, self.table)]


THROUGHPUT: Final = Chart(
    "Tokens per second", "minutes", "tokens/s while at work", "minutes", ("minute", "tokens", "busy_s")
)
ACCEPTANCE: Final = Chart(
    "Draft tokens accepted in a step",
    "accepted draft tokens",
    "share of steps",
    "acceptance",
    ("accepted_tokens", "steps"),
)
TREE_SIZES: Final = Chart(
    "Tree size at each batch size",
    "sequences in the step",
    "draft nodes per sequence",
    "batch_sizes",
    ("batch_sequences", "mean_tree_nodes", "steps"),
)
RELIABILITY: Final = Chart(
    "Accepted against expected",
    "expected accepted tokens",
    "accepted tokens",
    "reliability",
    ("mean_expected", "mean_accepted", "steps"),
)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens per second in consecutive intervals of equal length."""

    interval_s: int
    rates: tuple[tuple[int, float], ...]  # (Unix second at which the interval starts, tokens per second)


@dataclass(frozen=True, slots=True)
class Dot:
    """A point of a scatter chart; `weight` is its number of steps relative to the largest, from 0 to 1."""

    x: float
    y: float
    weight: float


def throughput(statistics: Any, max_points: int) -> Throughput:
    """Return tokens per second over time, in at most `max_points` intervals of whole minutes.

    A minute counts with the seconds in which work was done, so that the rate of a job of four seconds is the one in
    its statistics. The rate of an interval without tokens is 0.
    """
    minutes = {
        start_s // MINUTE_S: (tokens, MINUTE_S if busy_s is None else busy_s)
        for start_s, tokens, busy_s in THROUGHPUT.rows(statistics)
    }
    if not minutes:
        return Throughput(MINUTE_S, ())
    first, last = min(minutes), max(minutes)
    minutes_per_interval = -(-(last + 1 - first) // max_points)
    sums = [(0, 0.0)] * ((last - first) // minutes_per_interval + 1)
    for minute, (tokens, busy_s) in minutes.items():
        index = (minute - first) // minutes_per_interval
        sums[index] = (sums[index][0] + tokens, sums[index][1] + busy_s)
    interval_s = minutes_per_interval * MINUTE_S
    rates = ((first * MINUTE_S + index * interval_s, _rate(sums, index, interval_s)) for index in range(len(sums)))
    return Throughput(interval_s, tuple(rates))


def acceptance_shares(statistics: Any) -> list[tuple[int, float]]:
    """Return (accepted draft tokens, share of steps); empty if there were no steps."""
    rows = ACCEPTANCE.rows(statistics)
    total = sum(steps for _, steps in rows)
    return [(accepted, steps / total) for accepted, steps in rows] if total else []


def dots(chart: Chart, statistics: Any) -> list[Dot]:
    """Return the points of TREE_SIZES or RELIABILITY."""
    rows = chart.rows(statistics)
    max_steps = max((steps for _, _, steps in rows), default=1)
    return [Dot(x, y, steps / max_steps) for x, y, steps in rows]


def phase_shares(draft: float, verify: float) -> Sequence[tuple[str, float]]:
    """Return the phases of a step and their shares of its time: the host has what draft and verify leave."""
    return (("draft", draft), ("verify", verify), ("host", max(0.0, 1 - draft - verify)))


def spread(rows: Sequence[Any], max_rows: int) -> Iterable[Any]:
    """Return at most `max_rows` of the rows, evenly spaced from first to last."""
    if len(rows) <= max_rows:
        return rows
    return [rows[round(index * (len(rows) - 1) / (max_rows - 1))] for index in range(max_rows)]


def _rate(sums: Sequence[tuple[int, float]], index: int, interval_s: int) -> float:
    """Return the rate of an interval; with little work in it, the rate together with a neighbour.

    Steps are dated by the worker's clock and work by the database's, so the two may fall into different intervals.
    """
    tokens, busy_s = sums[index]
    if tokens and busy_s < _MIN_BUSY_S:
        neighbours = (sums[at] for at in (index - 1, index + 1) if 0 <= at < len(sums) and sums[at][0])
        more_tokens, more_s = next(neighbours, (0, 0.0))
        tokens, busy_s = tokens + more_tokens, busy_s + more_s
    return tokens / (busy_s or interval_s)
