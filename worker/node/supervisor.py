"""Start the replicas of a node, each pinned to its GPUs and CPUs, and keep them running.

A replica is a complete worker process: it registers itself and claims requests like any other. The supervisor loads
neither models nor torch.
"""

from __future__ import annotations

import logging
import os

from jobs.local.startup import environment
from jobs.processes import BAD_SETTINGS_STATUS, Children, Command, python_module, stop_signals
from worker.node.placement import ReplicaResources, place_replicas
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_EXIT_MARGIN_S = 3.0  # added to drain_s before a replica is killed


def is_needed(settings: WorkerSettings) -> bool:
    """Return whether the settings ask for other than one replica in this process."""
    return settings.replicas != 1


def supervise(settings: WorkerSettings) -> int:
    """Run the replicas until a signal; return the exit status. Raises SetupError if they do not fit.

    A dead replica is restarted with a growing delay. A stop drains all replicas at once. Their logs go to this
    process's stderr.
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
            misconfigured = children.keep_running(stop)
        finally:
            children.stop(at_once, together=True)
    return 0 if misconfigured is None else BAD_SETTINGS_STATUS


def replica(settings: WorkerSettings, placement: ReplicaResources) -> Command:
    """Return the command that starts one replica."""
    variables = environment(settings) | placement.environment
    if not settings.threads:
        variables["BASIC_THREADS"] = str(max(1, len(placement.cpus) // settings.tp))
    stop_s = settings.drain_s + _EXIT_MARGIN_S
    return Command(
        f"replica {placement.number}", python_module("worker"), variables, stop_s=stop_s, cpus=placement.cpus
    )


def _where(placement: ReplicaResources) -> str:
    cpus = f"{len(placement.cpus)} of {os.cpu_count()} CPUs"
    return f"GPU {', '.join(placement.gpus)} and {cpus}" if placement.gpus else cpus
