"""Connections to PostgreSQL that give up on a server which does not answer.

A server that is stopped or cut off keeps its connections open, and its own timeouts do not run. So the time is taken on
this side: a connection that waits too long is closed, and what it was asked for raises OperationalError, as it does
when the server is gone.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors
from sqlalchemy import Engine, event

_PING_S: Final = 2.0  # to learn whether a connection from the pool is still good
_SHARE: Final = 0.9  # of the time, after which a server that is alive breaks a statement off by itself

T = TypeVar("T")


class TimeoutConnection(psycopg.Connection[Any]):
    """A connection that waits `statement_timeout_s` at most for the answer to one statement, and less for a ping."""

    statement_timeout_s: float = 0.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for the server; raise OperationalError and close the connection when the time is over."""
        limit_s = _PING_S if self.autocommit else self.statement_timeout_s
        limit_s = limit_s if timeout is None else min(limit_s, timeout)
        try:
            return super().wait(gen, interval, limit_s)
        except errors._WaitTimeout as exc:
            self.pgconn.finish()
            raise psycopg.OperationalError(f"the server did not answer within {limit_s:g} s") from exc


def limit_statements(engine: Engine, statement_timeout_s: float) -> None:
    """Let no statement of this engine take longer than `statement_timeout_s`, whether the server is alive or not."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: Any, named: Any) -> TimeoutConnection:
        connection = TimeoutConnection.connect(*arguments, **named)
        connection.statement_timeout_s = statement_timeout_s
        try:
            connection.execute(f"SET statement_timeout = {int(statement_timeout_s * _SHARE * 1000)}")
            connection.commit()
        except psycopg.Error:
            connection.close()
            raise
        return connection
