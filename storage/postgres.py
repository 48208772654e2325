"""PostgreSQL connections with a client-side statement timeout.

A server that is suspended or cut off keeps its connections open and runs none of its own timeouts. So the client
measures: it closes a connection that waits too long, and the statement raises OperationalError, as for a lost server.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import psycopg
from psycopg import errors
from sqlalchemy import Engine, event

_PING_TIMEOUT_S: Final = 2.0  # of the pool's check whether a connection still works
_SERVER_SHARE: Final = 0.9  # the server's own statement_timeout, as a share of the client's: it should act first

T = TypeVar("T")


class TimeoutConnection(psycopg.Connection[Any]):
    """A connection that waits at most `statement_timeout_s` for one statement, and less for a ping."""

    statement_timeout_s: float = 0.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Wait for the server; after the timeout, close the connection and raise OperationalError."""
        limit_s = _PING_TIMEOUT_S if self.autocommit else self.statement_timeout_s
        limit_s = limit_s if timeout is None else min(limit_s, timeout)
        try:
            return super().wait(gen, interval, limit_s)
        except errors._WaitTimeout as exc:
            self.pgconn.finish()
            raise psycopg.OperationalError(f"the server did not answer within {limit_s:g} s") from exc


def limit_statements(engine: Engine, statement_timeout_s: float) -> None:
    """Limit every statement of an engine to `statement_timeout_s`, on the server and on the client."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: Any, named: Any) -> TimeoutConnection:
        connection = TimeoutConnection.connect(*arguments, **named)
        connection.statement_timeout_s = statement_timeout_s
        try:
            connection.execute(f"SET statement_timeout = {int(statement_timeout_s * _SERVER_SHARE * 1000)}")
            connection.commit()
        except psycopg.Error:
            connection.close()
            raise
        return connection
