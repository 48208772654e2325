"""`python -m worker.health`: exit status 0 if a worker of this host serves; the health check of a container.

If BASIC_TARGET names several models, each must be served.
Imports no torch. Workers write heartbeats to the database only while their engine makes progress.
"""

from __future__ import annotations

import socket
import sys

from jobs.errors import BasicError
from jobs.messages import model_name
from jobs.schema_check import explain_database_errors
from jobs.settings import read_settings
from storage import queries
from storage.records import HEARTBEAT_TIMEOUT_S
from storage.session import Database
from worker.settings import WorkerSettings


def main() -> int:
    """Print the problem, if any, and return the exit status."""
    try:
        settings = read_settings(WorkerSettings)
        url = settings.resolved_database_url
        with explain_database_errors(url):
            database = Database.open(url)
            served = models_here(database)
            database.dispose()
    except BasicError as error:
        print(error, file=sys.stderr)
        return 1
    several = [model_name(target) for target in settings.targets] if len(settings.targets) > 1 else []
    missing = [model for model in several if model not in served]
    if served and not missing:
        return 0
    what = f" that serves {missing[0]}" if served else ""
    print(
        f"no worker of {socket.gethostname()}{what} has sent a heartbeat for {HEARTBEAT_TIMEOUT_S:.0f} s",
        file=sys.stderr,
    )
    return 1


def models_here(database: Database) -> set[str]:
    """Return the models of the live workers of this host."""
    with database.read() as session:
        workers = queries.workers(session, within_s=HEARTBEAT_TIMEOUT_S)
        return {worker.target for worker in workers if worker.hostname == socket.gethostname()}


if __name__ == "__main__":
    sys.exit(main())
