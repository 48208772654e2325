"""SQL that differs between SQLite and PostgreSQL, and conditions that several modules share."""

from __future__ import annotations

import json
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self

from sqlalchemy import (
    JSON,
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    Connection,
    Double,
    Row,
    String,
    and_,
    bindparam,
    cast,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from storage.models import Base, JobRow, Request, Served
from storage.records import RequestKey
from storage.statuses import OPEN_REQUEST_STATUSES

AnyRow = Row[*tuple[Any, ...]]

_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")  # in PostgreSQL
_CLOCK: Final[Mapping[str, str]] = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}
_NOW: Final = {dialect: f"SELECT {clock}" for dialect, clock in _CLOCK.items()}


def database_now(session: Session) -> float:
    """Return the database's clock in Unix seconds. Leases use only this clock: workers' clocks may be wrong."""
    return float(session.connection().exec_driver_sql(_NOW[dialect_of(session)]).scalar_one())


def clock(dialect: str) -> ColumnElement[float]:
    """Return the database's clock as an expression, which saves a query."""
    return literal_column(f"(SELECT {_CLOCK[dialect]})", Double())


def repeatable_read(session: Session) -> None:
    """Make the transaction that is about to begin see one snapshot in all its queries, as SQLite always does."""
    if dialect_of(session) == "postgresql":
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})


def insert_or_ignore(session: Session, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT that skips rows whose key exists."""
    return insert_into(session, model).on_conflict_do_nothing()


def insert_into(session: Session, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT of the session's dialect, which supports ON CONFLICT."""
    return insert_for(dialect_of(session), model)


def insert_for(dialect: str, model: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Return an INSERT of a dialect, which supports ON CONFLICT."""
    return postgresql.insert(model) if dialect == "postgresql" else sqlite.insert(model)


def round_down(session: Session, value: ColumnElement[Any]) -> ColumnElement[int]:
    """Round a non-negative number down. SQLite may lack floor(), but its cast truncates."""
    return cast(func.floor(value) if dialect_of(session) == "postgresql" else value, BigInteger)


def position_of(session: Session, value: InstrumentedAttribute[Any], part: str) -> ColumnElement[int]:
    """Return the 1-based position of a substring; 0: not found."""
    return func.strpos(value, part) if dialect_of(session) == "postgresql" else func.instr(value, part)


def insert_many(session: Session, model: type[Base], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows with equal columns, with COPY on PostgreSQL. Mapped objects would take several times as long."""
    table: Any = model.__table__
    names = list(rows[0])
    to_json = {name for name in names if isinstance(table.c[name].type, JSON)}
    columns = ", ".join(f'"{name}"' for name in names)
    values = (
        [json.dumps(row[name]) if name in to_json and row[name] is not None else row[name] for name in names]
        if to_json
        else [row[name] for name in names]
        for row in rows
    )
    if dialect_of(session) != "postgresql":
        marks = ", ".join("?" * len(names))
        statement = f'INSERT INTO "{table.description}" ({columns}) VALUES ({marks})'
        session.connection().exec_driver_sql(statement, [tuple(row) for row in values])
        return
    copy_rows(session, f'"{table.description}" ({columns})', values)


def copy_rows(session: Session, target: str, rows: Iterable[Sequence[Any]]) -> None:
    """Insert rows into a table and its columns with COPY, on PostgreSQL."""
    connection: Any = session.connection().connection.driver_connection
    statement = f"COPY {target} FROM STDIN"
    driver: Any = session.get_bind().dialect.dbapi
    try:
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except driver.Error as error:  # raise SQLAlchemy's: callers distinguish an unavailable database by it
        raise DBAPIError.instance(statement, None, error, driver.Error) from error


def is_request(keys: Iterable[RequestKey]) -> ColumnElement[bool]:
    """Return the condition that a row of `requests` has one of these keys."""
    return is_one_of((Request.job_id, Request.request_index), keys)


def is_one_of(columns: Sequence[InstrumentedAttribute[Any]], keys: Iterable[tuple[Any, ...]]) -> ColumnElement[bool]:
    """Return the condition that the columns (job id, request index, others) equal one of the keys.

    Avoids `(a, b) IN (…)`, for which SQLite scans the whole table: keys that differ only in the request are grouped.
    The requests of a group are one parameter: a parameter for each takes SQLAlchemy several times as long.
    """
    job_id, request_index, *others = columns
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for job, index, *rest in keys:
        groups[job, *rest].append(index)
    alternatives = [
        and_(
            _IsListed(request_index, bindparam(None, str(indexes), unique=True)),
            *map(operator.eq, (job_id, *others), common),
        )
        for common, indexes in groups.items()
    ]
    return or_(false(), *alternatives)


def has_keys(
    jobs: int,
    job_id: InstrumentedAttribute[str] = Request.job_id,
    request_index: InstrumentedAttribute[int] = Request.request_index,
) -> ColumnElement[bool]:
    """Return the condition that a row has one of the request keys of `jobs` jobs, for a statement built once.

    Its parameters are `key_parameters`. Building a statement takes several times as long as executing it.
    """
    alternatives = [
        and_(
            _IsListed(request_index, bindparam(f"requests_{number}", type_=String())),
            job_id == bindparam(f"job_{number}"),
        )
        for number in range(jobs)
    ]
    return or_(false(), *alternatives)


def key_parameters(keys: Iterable[RequestKey]) -> tuple[int, dict[str, str]]:
    """Return the number of jobs of the keys, and the parameters of `has_keys` for them."""
    jobs: defaultdict[str, list[int]] = defaultdict(list)
    for job_id, request_index in keys:
        jobs[job_id].append(request_index)
    parameters = {f"job_{number}": job_id for number, job_id in enumerate(jobs)}
    return len(jobs), parameters | {f"requests_{number}": str(found) for number, found in enumerate(jobs.values())}


class _IsListed(FunctionElement[bool]):
    """The condition that an integer column has one of the numbers of a list, which is given as JSON."""

    type = Boolean()
    name = "is_listed"
    inherit_cache = True

    def self_group(self, against: object = None) -> Self:
        """Return the condition as it is: SQLite would not use an index for `… = 1`."""
        return self


@compiles(_IsListed, "sqlite")
def _in_json(element: _IsListed, compiler: SQLCompiler, **options: Any) -> str:
    column, numbers = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({numbers}))"


@compiles(_IsListed, "postgresql")
def _in_array(element: _IsListed, compiler: SQLCompiler, **options: Any) -> str:
    column, numbers = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} = ANY (CAST(translate({numbers}, '[]', '{{}}') AS INTEGER[]))"


def owned_by(column: InstrumentedAttribute[str], owner: str | None) -> ColumnElement[bool]:
    """Return the condition that a row belongs to an owner; None: any owner."""
    return true() if owner is None else column == owner


def is_lapsed(now: float) -> ColumnElement[bool]:
    """Return the condition that the lease of a running request was not renewed in time."""
    return and_(Request.status == "running", Request.lease_expires_at < now)


def has_served(session: Session, worker_id: str) -> bool:
    """Return whether a worker has committed tokens of any request."""
    return session.scalar(select(Served.worker_id).where(Served.worker_id == worker_id)) is not None


def is_serving() -> ColumnElement[bool]:
    """Return the condition that a job is in progress and not paused."""
    return and_(JobRow.status == "in_progress", JobRow.paused_at.is_(None))


def has_queued_requests() -> ColumnElement[bool]:
    """Return the condition that a job has queued requests."""
    return _has_request(Request.status == "queued")


def has_open_requests() -> ColumnElement[bool]:
    """Return the condition that a job has queued or running requests."""
    return _has_request(Request.status.in_(OPEN_REQUEST_STATUSES))


def has_expired_requests() -> ColumnElement[bool]:
    """Return the condition that requests of a job expired with its completion window."""
    return _has_request(Request.status == "expired")


def running_requests(now: float | BindParameter[float]) -> ColumnElement[int]:
    """Return the number of a job's running requests with a live lease."""
    alive = and_(Request.status == "running", Request.lease_expires_at >= now)
    return select(func.count()).where(Request.job_id == JobRow.id, alive).correlate(JobRow).scalar_subquery()


def has_room() -> ColumnElement[bool]:
    """Return the condition that a job runs fewer requests than `max_concurrent`. Lapsed ones count: they may run."""
    running = select(func.count()).where(Request.job_id == JobRow.id, Request.status == "running")
    return or_(JobRow.max_concurrent.is_(None), running.correlate(JobRow).scalar_subquery() < JobRow.max_concurrent)


def storable(text: str) -> str:
    """Replace what PostgreSQL cannot store, NUL and lone surrogates, by U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def _has_request(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return select(Request.job_id).where(Request.job_id == JobRow.id, condition).correlate(JobRow).exists()


def dialect_of(session: Session | Connection) -> str:
    """Return `sqlite` or `postgresql`."""
    return session.dialect.name if isinstance(session, Connection) else session.get_bind().dialect.name
