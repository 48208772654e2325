"""Start a worker: one replica in this process, or a supervisor of several.

torch is imported only by processes that load models.
"""

from __future__ import annotations

import sys

from jobs.errors import BasicError, SetupError
from jobs.logs import log_to_stderr
from jobs.processes import BAD_SETTINGS_STATUS, RESTART_STATUS
from jobs.schema_check import exit_status
from jobs.settings import read_settings
from storage.session import DATABASE_UNAVAILABLE, unavailable_reason
from worker.engine.errors import EngineError
from worker.loading.rank_processes import RankProcesses
from worker.node import supervisor
from worker.settings import WorkerSettings
from worker.sharing.access import DeviceAccess, SharedAccess, SoleAccess


def run(settings: WorkerSettings, access: DeviceAccess | None = None) -> int:
    """Serve until a signal. Print setup errors as one sentence. The exit status tells whether a restart can help.

    `access` is that of one of several models to the device that they share.
    """
    log_to_stderr(settings.log_format)
    name = f"{settings.default_model}: " if access else ""
    try:
        return supervisor.supervise(settings) if supervisor.is_needed(settings) else _serve(settings, access)
    except BasicError as error:
        print(f"{name}{error}", file=sys.stderr)
        return exit_status(error)
    except EngineError as error:
        print(f"{name}{error}", file=sys.stderr)
        return BAD_SETTINGS_STATUS
    except DATABASE_UNAVAILABLE as error:
        print(f"the database does not answer: {unavailable_reason(error)}", file=sys.stderr)
        return RESTART_STATUS


def main(broker: str = "", index: str = "0") -> int:
    """Run a worker with the settings of the environment.

    The supervisor of several models on one device starts each with the address of the broker and the model's index.
    """
    try:
        settings = read_settings(WorkerSettings)
    except SetupError as error:
        print(error, file=sys.stderr)
        return BAD_SETTINGS_STATUS
    return run(settings, SharedAccess(broker, int(index)) if broker else None)


def _serve(settings: WorkerSettings, access: DeviceAccess | None) -> int:
    processes = RankProcesses(settings) if settings.tp > 1 else None  # they import torch while this process does
    from worker.tasks import serve

    return serve(settings, access or SoleAccess(), processes)
