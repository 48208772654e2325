"""`python -m worker.health`: whether some worker of this host serves. What a container's health check runs.

[health] -> storage.  Loads no torch. The workers themselves say in SQL that they live, and only while they are of use.
"""

from __future__ import annotations

import socket
import sys

from storage import queries
from storage.session import DATABASE_AWAY, Database, why_away
from worker.settings import WorkerSettings

_SILENT_S = 60.0  # a worker beats every few seconds


def main() -> int:
    """Say what is wrong, if anything is, and return the exit status."""
    database = Database.open(WorkerSettings().resolved_database_url)
    try:
        serving = workers_here(database)
    except DATABASE_AWAY as error:
        print(f"the database does not answer: {why_away(error)}", file=sys.stderr)
        return 1
    finally:
        database.dispose()
    if not serving:
        print(f"no worker of {socket.gethostname()} has been seen for {_SILENT_S:.0f} s", file=sys.stderr)
    return 0 if serving else 1


def workers_here(database: Database) -> int:
    """Return how many workers of this host were seen lately and have not left."""
    with database.read() as session:
        return queries.live_workers(session, socket.gethostname(), _SILENT_S)


if __name__ == "__main__":
    sys.exit(main())
