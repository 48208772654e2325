"""Start the replicas of a node, each pinned to its GPUs and CPUs, and keep them running.

A replica is a complete worker process: it registers itself and claims requests like any other. Several models have a
process each in a replica, on the same device: a broker deals turns and memory to them. So what ends the process of one
model ends no other. The supervisor loads neither models nor torch.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack

from jobs.errors import SetupError
from jobs.processes import BAD_SETTINGS_STATUS, Children, Command, python_module, stop_signals
from jobs.settings import environment
from worker.node.placement import ReplicaResources, place_replicas
from worker.settings import WorkerSettings
from worker.sharing.broker import DeviceBroker

log = logging.getLogger(__name__)

_EXIT_MARGIN_S = 3.0  # added to drain_s before a replica is killed


def is_needed(settings: WorkerSettings) -> bool:
    """Return whether the settings ask for other than one replica of one model in this process."""
    return settings.replicas != 1 or len(settings.targets) > 1


def supervise(settings: WorkerSettings) -> int:
    """Run the replicas until a signal; return the exit status. Raises SetupError if they do not fit.

    One that can't start because of its settings or its model stops all.
    A dead replica is restarted with a growing delay. A stop drains all replicas at once. Their logs go to this
    process's stderr.
    """
    _refuse_to_share(settings)
    with stop_signals() as (stop, at_once), ExitStack() as brokers:
        children = Children()
        try:
            for placement in place_replicas(settings.replicas, settings.tp):
                for command in _commands(settings, placement, brokers):
                    child = children.start(command)
                    log.info(
                        "Started %s as process %d on %s",
                        command.name,
                        child.pid,
                        _where(placement),
                        extra={"action": "replica_started"},
                    )
            misconfigured = children.keep_running(stop)
            if misconfigured is not None:
                log.error("%s can't start: all stop", misconfigured.command.name, extra={"action": "replica_refused"})
        finally:
            children.stop(at_once, together=True)
    return 0 if misconfigured is None else BAD_SETTINGS_STATUS


def _refuse_to_share(settings: WorkerSettings) -> None:
    """Raise SetupError for settings that several models on one device can't have."""
    if len(settings.targets) == 1:
        return
    for name, is_set in (("BASIC_TP", settings.tp > 1), ("BASIC_DEVICE_MAP", bool(settings.device_map))):
        if is_set:
            raise SetupError(
                f"{name} spreads one model over devices, and BASIC_TARGET names {len(settings.targets)} models for one "
                "device; unset one of them, or start a worker for each model"
            )


def _commands(settings: WorkerSettings, placement: ReplicaResources, brokers: ExitStack) -> list[Command]:
    """Return the commands that start the processes of a replica; a broker of several starts at once."""
    each = settings.for_each_target()
    if len(each) == 1:
        return [replica(settings, placement)]
    broker = brokers.enter_context(DeviceBroker([one.default_model for one in each]))
    return [
        replica(one, placement, f"{one.default_model} in ", (broker.address, str(index)))
        for index, one in enumerate(each)
    ]


def replica(
    settings: WorkerSettings, placement: ReplicaResources, model: str = "", device: tuple[str, ...] = ()
) -> Command:
    """Return the command that starts a replica, or the process of one `model` of it.

    `device` is what the process of one of several models needs to share the device: the broker's address and its index.
    """
    variables = environment(settings) | placement.environment
    variables["BASIC_MEMORY_SHARE"] = f"{settings.memory_share * placement.memory_share:.6g}"
    if not settings.threads:
        variables["BASIC_THREADS"] = str(max(1, len(placement.cpus) // settings.tp))
    stop_s = settings.drain_s + _EXIT_MARGIN_S
    return Command(
        f"{model}replica {placement.number}",
        python_module("worker", *device),
        variables,
        stop_s=stop_s,
        cpus=placement.cpus,
    )


def _where(placement: ReplicaResources) -> str:
    cpus = f"{len(placement.cpus)} of {os.cpu_count()} CPUs"
    return f"GPU {', '.join(placement.gpus)} and {cpus}" if placement.gpus else cpus
