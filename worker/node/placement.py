"""Assign GPUs and CPUs to the replicas of this machine.

Reads the operating system's files instead of CUDA, so that the supervisor holds no GPU memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from jobs.errors import SetupError

_ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class ReplicaResources:
    """GPUs, CPUs and memory of one replica."""

    number: int
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them; empty on a CPU machine
    cpus: frozenset[int]
    memory_share: float  # share of the machine's free main memory

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the replica's process."""
        environment = {"BASIC_REPLICAS": "1"}
        if self.gpus:
            # CUDA numbers the fastest GPU first by default; in bus order a number means the same GPU in every process.
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return environment


def place_replicas(
    replicas: int, ranks: int, environ: Mapping[str, str] = os.environ, root: Path = _ROOT
) -> list[ReplicaResources]:
    """Return the placements of `replicas` replicas with `ranks` ranks each; 0: as many replicas as the GPUs hold.

    Each rank gets its own GPU, and each replica CPUs near its GPUs. Without GPUs the replicas share the CPUs evenly.
    Raises SetupError, with what fits, if there are too few GPUs.
    """
    gpus = visible_gpus(environ, root)
    if not gpus:
        return _on_cpus_only(replicas or 1, allowed_cpus())
    replicas = replicas or max(1, len(gpus) // ranks)
    if replicas * ranks > len(gpus):
        fitting = len(gpus) // ranks
        raise SetupError(
            f"{replicas} replicas of {ranks} GPUs need {replicas * ranks} and {len(gpus)} are visible; "
            + (f"start {fitting} replicas" if fitting else f"lower --tp to at most {len(gpus)}")
            + ", or see `basic plan`"
        )
    groups = [tuple(gpus[n * ranks : (n + 1) * ranks]) for n in range(replicas)]
    return [
        ReplicaResources(n, group, cpus, 1 / replicas)
        for n, (group, cpus) in enumerate(zip(groups, _cpus_near(groups, root), strict=True))
    ]


def visible_gpus(environ: Mapping[str, str] = os.environ, root: Path = _ROOT) -> list[str]:
    """Return the GPUs that this process may use: CUDA_VISIBLE_DEVICES, else all GPUs in bus order."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number in range(len(_bus_addresses(root)))]


def allowed_cpus() -> list[int]:
    """Return the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def parse_cpu_list(text: str) -> set[int]:
    """Return the CPUs of a kernel CPU list such as 0-3,8-11."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _on_cpus_only(replicas: int, cpus: Sequence[int]) -> list[ReplicaResources]:
    return [ReplicaResources(n, (), group, 1 / replicas) for n, group in enumerate(_split_cpus(replicas, cpus))]


def _split_cpus(count: int, cpus: Sequence[int]) -> list[frozenset[int]]:
    """Split CPUs into `count` runs of neighbours; with fewer CPUs than that, runs share a CPU."""
    if count >= len(cpus):
        return [frozenset({cpus[n % len(cpus)]}) for n in range(count)]
    edges = [len(cpus) * n // count for n in range(count + 1)]
    return [frozenset(cpus[first:last]) for first, last in pairwise(edges)]


def _cpus_near(groups: Sequence[tuple[str, ...]], root: Path) -> list[frozenset[int]]:
    """Return CPUs for each GPU group: those on the NUMA node of its first GPU, split evenly among its groups."""
    allowed = allowed_cpus()
    nearby = [tuple(sorted(_local_cpus(group[0], root) & set(allowed)) or allowed) for group in groups]
    assigned: list[frozenset[int]] = []
    for number, near in enumerate(nearby):
        neighbours = [n for n, other in enumerate(nearby) if other == near]
        assigned.append(_split_cpus(len(neighbours), near)[neighbours.index(number)])
    return assigned


def _local_cpus(gpu: str, root: Path) -> set[int]:
    addresses = _bus_addresses(root)
    if not gpu.isdigit() or int(gpu) >= len(addresses):  # named by UUID, or not in the driver's list
        return set()
    try:
        return parse_cpu_list((root / "sys/bus/pci/devices" / addresses[int(gpu)] / "local_cpulist").read_text())
    except OSError:
        return set()


def _bus_addresses(root: Path) -> list[str]:
    folder = root / "proc/driver/nvidia/gpus"
    return sorted(path.name.lower() for path in folder.iterdir()) if folder.is_dir() else []
