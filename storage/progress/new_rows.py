"""Insert rows that are not there yet, many with one statement, and return which ones were new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from storage.dialect import copy_rows, dialect_of
from storage.models import ChoiceOutput, Partial

RowKey = tuple[Any, ...]  # the primary key


def insert_new(
    session: Session, model: type[Partial | ChoiceOutput], rows: Mapping[RowKey, Mapping[str, Any]]
) -> list[RowKey]:
    """Insert rows by primary key, all with the same columns, JSON as text; return the keys of those that were new.

    A row has the event number of its flush, which no earlier flush of the job has used.
    """
    if not rows:
        return []
    names = [*(column.name for column in model.__table__.primary_key), *next(iter(rows.values()))]
    target = f"{model.__tablename__} ({', '.join(names)})"
    values = [(*key, *row.values()) for key, row in rows.items()]
    if dialect_of(session) == "postgresql" and _copied(session, target, values):
        return list(rows)
    mark = "%s" if dialect_of(session) == "postgresql" else "?"
    statement = f"INSERT INTO {target} VALUES ({', '.join([mark] * len(names))}) ON CONFLICT DO NOTHING"
    done = session.connection().exec_driver_sql(statement, values, execution_options={"preserve_rowcount": True})
    return list(rows) if done.rowcount == len(rows) else _written(session, model, rows)


def _copied(session: Session, target: str, values: Sequence[tuple[Any, ...]]) -> bool:
    """Insert rows with COPY, the fastest way on PostgreSQL; return False, with nothing inserted, if one is there."""
    connection = session.connection()
    connection.exec_driver_sql("SAVEPOINT new_rows")
    try:
        copy_rows(session, target, values)
    except IntegrityError as error:
        if getattr(error.orig, "sqlstate", None) != _UNIQUE_VIOLATION:
            raise
        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT new_rows")
        return False
    connection.exec_driver_sql("RELEASE SAVEPOINT new_rows")
    return True


_UNIQUE_VIOLATION: Final = "23505"


def _written(
    session: Session, model: type[Partial | ChoiceOutput], rows: Mapping[RowKey, Mapping[str, Any]]
) -> list[RowKey]:
    """Return the keys of the rows that this flush has inserted: a repeat finds some of them there."""
    numbers = {(key[0], row["event_number"]) for key, row in rows.items()}
    of_this_flush = (and_(model.job_id == job_id, model.event_number == number) for job_id, number in numbers)
    found = session.execute(select(*model.__table__.primary_key).where(or_(*of_this_flush)))
    return [key for key in map(tuple, found) if key in rows]
