"""Pack the steps of before the upgrade: from `unpacked_steps` into `packed_steps`, in batches.

Each batch is one transaction that reads, packs and deletes rows, so a step is in exactly one of the tables and the view
shows all of them at any time. After an interruption at any point the next run continues. The last one drops the empty
table.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from sqlalchemy import (
    JSON,
    Connection,
    Engine,
    Text,
    column,
    delete,
    func,
    insert,
    inspect,
    select,
    table,
    text,
    tuple_,
)

from storage.session import write_connection
from storage.steps.columns import COLUMNS, StepColumns
from storage.steps.packing import NUMBERED, WITH_MINIMUM, packed_rows
from storage.steps.view import FIRST_COLUMNS, UNPACKED, create_step_view, drop_step_view

ROWS_AT_ONCE: Final = 10_000
_PAUSE_S: Final = 0.1  # after each batch: on SQLite other writers poll for the lock
_LOCK: Final = 0x62415353  # advisory lock id: one conversion at a time

_KEY: Final = ("job_id", "request_index", "choice_index", "step")
_TYPES: Final[dict[str, Any]] = {"reached": JSON(), "job_id": Text(), "worker_id": Text()}
_OLD: Final = table(UNPACKED, *(column(name, _TYPES.get(name)) for name in FIRST_COLUMNS))
_OLD_KEY: Final = tuple_(*(_OLD.c[name] for name in _KEY))
_NEW: Final = table(
    "packed_steps",
    *(column(name) for name in (*_KEY[:3], "first_step", "steps", "worker_id", *COLUMNS, *NUMBERED.values())),
    *(column(f"min_{name}") for name in WITH_MINIMUM),
)

Key = tuple[Any, ...]


def unpacked_steps(engine: Engine) -> int:
    """Return the number of steps that wait to be packed."""
    with engine.connect() as connection:
        if not inspect(connection).has_table(UNPACKED):
            return 0
        return int(connection.scalar(select(func.count()).select_from(_OLD)) or 0)


def pack_steps(engine: Engine, rows_at_once: int = ROWS_AT_ONCE) -> Iterator[int]:
    """Pack all steps that wait; yield the number of each transaction. Several processes may do so at once."""
    after: Key | None = None
    while True:
        with write_connection(engine) as connection:
            if connection.dialect.name == "postgresql":  # on SQLite the transaction itself is the lock
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            if not inspect(connection).has_table(UNPACKED):
                return
            rows = _next(connection, after, rows_at_once) or _next(connection, None, rows_at_once)
            if not rows:
                drop_step_view(connection)
                connection.execute(text(f"DROP TABLE {UNPACKED}"))
                create_step_view(connection)
                return
            after = _move(connection, rows)
        yield len(rows)
        if len(rows) == rows_at_once:
            time.sleep(_PAUSE_S)


def _next(connection: Connection, after: Key | None, limit: int) -> Sequence[Any]:
    """Return the first rows after a key: a query without it would read over the deleted rows again."""
    query = select(*_OLD.c).order_by(*(_OLD.c[name] for name in _KEY)).limit(limit)
    return connection.execute(query if after is None else query.where(after < _OLD_KEY)).all()


def _move(connection: Connection, rows: Sequence[Any]) -> Key:
    """Pack rows and delete them; return the key of the last."""
    packed: list[dict[str, Any]] = []
    for (*choice, worker_id, lead), run in groupby(enumerate(rows), _run):
        steps, places = StepColumns(), []
        for place, row in run:
            steps.add_row(row._mapping)
            places.append(place)
        packed += packed_rows(dict(zip(_KEY, choice, strict=False)), worker_id, steps, lead + places[0])
    connection.execute(insert(_NEW), packed)
    first_key, last_key = (tuple(getattr(rows[place], name) for name in _KEY) for place in (0, -1))
    connection.execute(delete(_OLD).where(first_key <= _OLD_KEY, last_key >= _OLD_KEY))
    return last_key


def _run(numbered: tuple[int, Any]) -> Key:
    """Return what is the same in consecutive steps of one choice and worker."""
    place, row = numbered
    return (row.job_id, row.request_index, row.choice_index, row.worker_id, row.step - place)
