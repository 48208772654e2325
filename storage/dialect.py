"""The few things that SQLite and PostgreSQL spell differently, and conditions that several modules share."""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    Double,
    Row,
    and_,
    cast,
    false,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session

from storage.models import Base, Job, Request, Served
from storage.records import RequestKey
from storage.statuses import OPEN_REQUEST_STATUSES

AnyRow = Row[*tuple[Any, ...]]

_CLOCK: Final[Mapping[str, str]] = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}
_NOW: Final = {dialect: text(f"SELECT {clock}") for dialect, clock in _CLOCK.items()}


def database_now(session: Session) -> float:
    """Return the database's clock, in Unix seconds. Leases are measured by it alone: clocks of workers may be wrong."""
    return float(session.execute(_NOW[dialect_of(session)]).scalar_one())


def clock(dialect: str) -> ColumnElement[float]:
    """Return the database's clock as a part of a query, which saves asking for it before."""
    return literal_column(f"(SELECT {_CLOCK[dialect]})", Double())


def repeatable_read(session: Session) -> None:
    """Let all queries of a transaction that has not begun see one state of the database, as SQLite's always do."""
    if dialect_of(session) == "postgresql":
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})


def insert_or_ignore(session: Session, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT that leaves rows alone that are there already."""
    return insert_into(session, model).on_conflict_do_nothing()


def insert_into(session: Session, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT of this database's kind, which can say what to do about rows that are there already."""
    return postgresql.insert(model) if dialect_of(session) == "postgresql" else sqlite.insert(model)


def whole(session: Session, value: ColumnElement[Any]) -> ColumnElement[int]:
    """Return a number from 0 up without its fraction. SQLite may lack floor(), and its cast cuts off."""
    return cast(func.floor(value) if dialect_of(session) == "postgresql" else value, BigInteger)


def position_of(session: Session, value: InstrumentedAttribute[Any], part: str) -> ColumnElement[int]:
    """Return the place, from 1 on, at which a part begins in a text; 0: it is not there."""
    return func.strpos(value, part) if dialect_of(session) == "postgresql" else func.instr(value, part)


def insert_many(session: Session, model: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert many rows that have the same columns: with COPY, where the database has it."""
    table: Any = model.__table__
    if dialect_of(session) != "postgresql":
        session.execute(insert(table), list(rows))  # its own columns: the detour by objects costs as much again
        return
    names = list(rows[0])
    to_json = [isinstance(table.c[name].type, JSON) for name in names]
    columns = ", ".join(f'"{name}"' for name in names)
    connection: Any = session.connection().connection.driver_connection
    with connection.cursor() as cursor, cursor.copy(f'COPY "{table.description}" ({columns}) FROM STDIN') as copy:
        for row in rows:
            copy.write_row(
                [
                    json.dumps(row[name]) if encode and row[name] is not None else row[name]
                    for name, encode in zip(names, to_json, strict=True)
                ]
            )


def is_request(keys: Iterable[RequestKey]) -> ColumnElement[bool]:
    """Return the condition that a row of `requests` is one of these."""
    return is_one_of((Request.job_id, Request.request_index), keys)


def is_one_of(columns: Sequence[InstrumentedAttribute[Any]], keys: Iterable[tuple[Any, ...]]) -> ColumnElement[bool]:
    """Return the condition that these columns (job, request, then others) have the values of one of the keys.

    `(a, b) IN (…)` would say the same, but SQLite reads the whole table for it. So keys that differ only in the request
    are put together.
    """
    job_id, request_index, *others = columns
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for job, index, *rest in keys:
        groups[job, *rest].append(index)
    alternatives = [
        and_(request_index.in_(indexes), *map(operator.eq, (job_id, *others), common))
        for common, indexes in groups.items()
    ]
    return or_(false(), *alternatives)


def owned_by(column: InstrumentedAttribute[str], owner: str | None) -> ColumnElement[bool]:
    """Return the condition that a row belongs to an owner; None: to anybody."""
    return true() if owner is None else column == owner


def is_lapsed(now: float) -> ColumnElement[bool]:
    """Return the condition that whoever runs a request has not renewed its lease in time."""
    return and_(Request.status == "running", Request.lease_expires_at < now)


def has_served(session: Session, worker_id: str) -> bool:
    """Return whether a worker has committed tokens of any request."""
    return session.scalar(select(Served.worker_id).where(Served.worker_id == worker_id)) is not None


def has_queued_requests() -> ColumnElement[bool]:
    """Return the condition that a job has a request that can be claimed."""
    return _has_request(Request.status == "queued")


def has_open_requests() -> ColumnElement[bool]:
    """Return the condition that a job has a request that has not ended."""
    return _has_request(Request.status.in_(OPEN_REQUEST_STATUSES))


def has_expired_requests() -> ColumnElement[bool]:
    """Return the condition that the completion window of a job was over before one of its requests had ended."""
    return _has_request(Request.status == "expired")


def running_requests(now: float) -> ColumnElement[int]:
    """Return the number of a job's requests that are being decoded."""
    alive = and_(Request.status == "running", Request.lease_expires_at >= now)
    return select(func.count()).where(Request.job_id == Job.id, alive).correlate(Job).scalar_subquery()


def storable(text: str) -> str:
    """Return the text as every database can hold it: NUL and halves of surrogate pairs become U+FFFD."""
    return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in text) if _odd(text) else text


def _odd(text: str) -> bool:
    if "\0" in text:
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _has_request(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return select(Request.job_id).where(Request.job_id == Job.id, condition).correlate(Job).exists()


def dialect_of(session: Session | Connection) -> str:
    """Return which of the two databases it is."""
    return session.dialect.name if isinstance(session, Connection) else session.get_bind().dialect.name
