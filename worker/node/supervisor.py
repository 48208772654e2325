"""The supervisor of a node: starts its replicas, each pinned to its GPUs and CPUs, and keeps them running.

A replica is a whole worker: it registers itself and pulls from the model's queue like any other, so that the supervisor
knows nothing of jobs. It loads no model and no torch.
"""

from __future__ import annotations

import logging
import os

from jobs.local.startup import environment
from jobs.processes import BAD_SETTINGS_STATUS, Children, Command, python_module, stop_signals
from worker.node.placement import Placement, place_replicas
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_LEAVE_S = 3.0  # beyond the time in which a replica hands its requests back


def is_needed(settings: WorkerSettings) -> bool:
    """Return whether the settings ask for more than the one replica that a process is by itself."""
    return settings.replicas != 1


def supervise(settings: WorkerSettings) -> int:
    """Run the replicas until a signal stops them, and return the exit status. Raises SetupError if they can't fit.

    A replica that dies is started again, later each time it dies soon. A stop drains all of them together. Their words
    go where ours go.
    """
    with stop_signals() as (stop, at_once):
        children = Children()
        try:
            for placement in place_replicas(settings.replicas, settings.tp):
                child = children.start(replica(settings, placement))
                log.info(
                    "Replica %d is process %d on %s",
                    placement.number,
                    child.pid,
                    _where(placement),
                    extra={"action": "replica_started"},
                )
            hopeless = children.keep_running(stop)
        finally:
            children.stop(at_once, together=True)
    return 0 if hopeless is None else BAD_SETTINGS_STATUS


def replica(settings: WorkerSettings, placement: Placement) -> Command:
    """Return how to start one replica."""
    told = environment(settings) | placement.environment
    if not settings.threads:
        told["BASIC_THREADS"] = str(max(1, len(placement.cpus) // settings.tp))
    stop_s = settings.drain_s + _LEAVE_S
    return Command(f"replica {placement.number}", python_module("worker"), told, stop_s=stop_s, cpus=placement.cpus)


def _where(placement: Placement) -> str:
    cpus = f"{len(placement.cpus)} of {os.cpu_count()} CPUs"
    return f"GPU {', '.join(placement.gpus)} and {cpus}" if placement.gpus else cpus
