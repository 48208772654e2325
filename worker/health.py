"""`python -m worker.health`: exit status 0 if a worker of this host serves; the health check of a container.

Imports no torch. Workers write heartbeats to the database only while their engine makes progress.
"""

from __future__ import annotations

import socket
import sys

from jobs.errors import BasicError
from jobs.schema_check import explain_database_errors
from jobs.settings import read_settings
from storage import queries
from storage.records import HEARTBEAT_TIMEOUT_S
from storage.session import Database
from worker.settings import WorkerSettings


def main() -> int:
    """Print the problem, if any, and return the exit status."""
    try:
        url = read_settings(WorkerSettings).resolved_database_url
        with explain_database_errors(url):
            database = Database.open(url)
            serving = workers_here(database)
            database.dispose()
    except BasicError as error:
        print(error, file=sys.stderr)
        return 1
    if not serving:
        print(
            f"no worker of {socket.gethostname()} has sent a heartbeat for {HEARTBEAT_TIMEOUT_S:.0f} s", file=sys.stderr
        )
    return 0 if serving else 1


def workers_here(database: Database) -> int:
    """Return the number of live workers of this host."""
    with database.read() as session:
        return queries.live_workers(session, socket.gethostname(), HEARTBEAT_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
