"""The view `decode_steps`: a row for every step of every choice, expanded from `packed_steps` in plain SQL.

One text per database; neither needs an extension. This module knows the tables by name only, because storage.models
imports it.

Workers of versions before `packed_steps` insert into `decode_steps`, and an upgrade runs beside them: a trigger packs
each of their rows by itself. Steps of before the upgrade stay in `unpacked_steps` until storage.steps.conversion has
packed them; as long as there is that table, the view shows its rows as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection, inspect, text

from storage.steps.packing import MAX_STEPS, OFFSET

VIEW: Final = "decode_steps"
UNPACKED: Final = "unpacked_steps"

# Columns of earlier versions, in their order; `unpacked_steps` has these.
FIRST_COLUMNS: Final = (
    "job_id",
    "request_index",
    "choice_index",
    "step",
    "tree_nodes",
    "tree_depth",
    "accepted_tokens",
    "emitted_tokens",
    "expected_accepted",
    "draft_ms",
    "verify_ms",
    "step_ms",
    "batch_sequences",
    "drafter",
    "plain_step_ms",
    "ended_at",
    "worker_id",
    "decision",
    "reached",
)
_LATER_COLUMNS: Final = ("preemptions", "recomputed_tokens")
_FIRST_COUNTS: Final = ("tree_nodes", "tree_depth", "accepted_tokens", "emitted_tokens", "batch_sequences")
_TIMES: Final = ("draft_ms", "verify_ms", "step_ms")


def create_step_view(connection: Connection) -> None:
    """Create the view, and the trigger for inserts of older versions. The tables must exist."""
    dialect = connection.dialect.name
    unpacked = inspect(connection).has_table(UNPACKED)
    connection.execute(text(f"CREATE VIEW {VIEW} AS{_select(dialect, unpacked)}"))
    for statement in _TRIGGER[dialect]:
        connection.execute(text(statement.format(insert=_insert(dialect))))


def drop_step_view(connection: Connection) -> None:
    """Drop the view and its trigger, if they exist."""
    connection.execute(text(f"DROP VIEW IF EXISTS {VIEW}"))
    if connection.dialect.name == "postgresql":
        connection.execute(text("DROP FUNCTION IF EXISTS pack_decode_step()"))


def packed_select(dialect: str, names: Sequence[str]) -> str:
    """Return the query of the steps in `packed_steps`: these columns of the view."""
    columns = _columns(dialect)
    return _SELECT[dialect].format(columns=",\n    ".join(f"{columns[name]} AS {name}" for name in names))


# `nth`: position of a step in its row.
_SELECT: Final = {
    "sqlite": f"""
WITH RECURSIVE positions (nth) AS (
    SELECT 0 UNION ALL SELECT nth + 1 FROM positions WHERE nth < {MAX_STEPS - 1}
)
SELECT
    {{columns}}
FROM packed_steps CROSS JOIN positions
WHERE nth < steps""",
    "postgresql": """
SELECT
    {columns}
FROM packed_steps CROSS JOIN LATERAL generate_series(0, steps - 1) AS nth""",
}
# Distance from the minimum; NULL: the column has no text.
_DISTANCE: Final = {
    "sqlite": f"unicode(substr({{0}}, nth + 1, 1)) - {OFFSET}",
    "postgresql": f"ascii(substr({{0}}, nth + 1, 1)) - {OFFSET}",
}
_ELEMENT: Final = {
    "sqlite": "json_extract({texts}, '$[' || ({number}) || ']')",
    "postgresql": "CAST({texts} AS json) ->> ({number})",
}
_JSON: Final = {"sqlite": "{0}", "postgresql": "CAST({0} AS json)"}


def _select(dialect: str, unpacked: bool) -> str:
    packed = packed_select(dialect, (*FIRST_COLUMNS, *_LATER_COLUMNS))
    if not unpacked:
        return packed
    columns = ", ".join((*FIRST_COLUMNS, *(f"0 AS {name}" for name in _LATER_COLUMNS)))
    return f"{packed}\nUNION ALL\nSELECT {columns}\nFROM {UNPACKED}"


def _columns(dialect: str) -> dict[str, str]:
    """Return the columns of the view by name, as SQL."""
    return {
        **{name: name for name in ("job_id", "request_index", "choice_index", "worker_id")},
        "step": "first_step + nth",
        "ended_at": _real(_number(dialect, "ended_ms"), 1_000),
        "expected_accepted": _real(_optional(dialect, "expected_accepted"), 1_000),
        "plain_step_ms": _real(_optional(dialect, "plain_step_ms"), 100),
        "drafter": _element(dialect, "drafter", "drafters"),
        "decision": _element(dialect, "decision", "decisions"),
        "reached": _reached(dialect),
        **{name: _number(dialect, name) for name in (*_FIRST_COUNTS, *_LATER_COLUMNS)},
        **{name: _real(_number(dialect, name), 100) for name in _TIMES},
    }


def _number(dialect: str, column: str) -> str:
    return f"min_{column} + coalesce({_DISTANCE[dialect].format(column)}, 0)"


def _optional(dialect: str, column: str) -> str:
    distance = _DISTANCE[dialect].format(column)
    return f"min_{column} + CASE WHEN {column} IS NULL THEN 0 ELSE NULLIF({distance}, 0) - 1 END"


def _real(units: str, per_whole: int) -> str:
    return f"({units}) / CAST({per_whole} AS DOUBLE PRECISION)"


def _element(dialect: str, column: str, texts: str) -> str:
    number = f"coalesce({_DISTANCE[dialect].format(column)}, 0)"
    return _ELEMENT[dialect].format(texts=texts, number=number)


def _reached(dialect: str) -> str:
    """Return the nodes that a step reached as JSON, as SQL: the compact `2,0;1,-` is [[2,0],[1,null]]."""
    compact = _element(dialect, "reached", "reached_lists")
    nodes = f"'[[' || replace(replace({compact}, ';', '],['), '-', 'null') || ']]'"
    return _JSON[dialect].format(f"CASE {compact} WHEN '' THEN '[]' ELSE {nodes} END")


_TRIGGER: Final = {
    "sqlite": (
        f"""
CREATE TRIGGER pack_decode_step INSTEAD OF INSERT ON {VIEW} BEGIN
    {{insert}};
END""",
    ),
    "postgresql": (
        """
CREATE OR REPLACE FUNCTION pack_decode_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {insert};
    RETURN NEW;
END $$""",
        f"""
CREATE TRIGGER pack_decode_step INSTEAD OF INSERT ON {VIEW} FOR EACH ROW EXECUTE FUNCTION pack_decode_step()""",
    ),
}
_LIST_OF: Final = {"sqlite": "json_array({0})", "postgresql": "CAST(json_build_array({0}) AS text)"}
_COMPACT: Final = (  # of [[2, 0], [1, null]]: 2,0;1,-
    "replace(replace(replace(replace(replace(CAST(NEW.reached AS text)"
    ", ' ', ''), '],[', ';'), 'null', '-'), '[', ''), ']', '')"
)


def _insert(dialect: str) -> str:
    """Return the statement that packs one row, NEW: all its columns are minimums."""
    values: dict[str, str] = {
        **{name: f"NEW.{name}" for name in ("job_id", "request_index", "choice_index", "worker_id")},
        "first_step": "NEW.step",
        "steps": "1",
        "min_ended_ms": _whole("ended_at", 1_000),
        "min_expected_accepted": _whole("expected_accepted", 1_000),
        **{f"min_{name}": f"NEW.{name}" for name in _FIRST_COUNTS},
        **{f"min_{name}": _whole(name, 100) for name in (*_TIMES, "plain_step_ms")},
        "drafters": _list_of(dialect, "drafter", "NEW.drafter"),
        "decisions": _list_of(dialect, "decision", "NEW.decision"),
        "reached_lists": _list_of(dialect, "reached", _COMPACT),
    }
    return f"INSERT INTO packed_steps ({', '.join(values)}) VALUES ({', '.join(values.values())})"


def _whole(column: str, units: int) -> str:
    return f"CAST(round(NEW.{column} * {units}) AS BIGINT)"


def _list_of(dialect: str, column: str, value: str) -> str:
    return f"CASE WHEN NEW.{column} IS NOT NULL THEN {_LIST_OF[dialect].format(value)} END"
