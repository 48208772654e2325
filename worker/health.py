"""`python -m worker.health`: whether some worker of this host serves. What a container's health check runs.

Loads no torch. The workers themselves say in SQL that they live, and only while they are of use.
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
    """Say what is wrong, if anything is, and return the exit status."""
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
        print(f"no worker of {socket.gethostname()} has been seen for {HEARTBEAT_TIMEOUT_S:.0f} s", file=sys.stderr)
    return 0 if serving else 1


def workers_here(database: Database) -> int:
    """Return how many workers of this host were seen lately and have not left."""
    with database.read() as session:
        return queries.live_workers(session, socket.gethostname(), HEARTBEAT_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main())
