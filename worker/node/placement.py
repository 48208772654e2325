"""Placement: which GPUs and which CPUs each replica of this machine gets.

Asks the operating system, never CUDA: whoever supervises should hold no GPU.
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
class Placement:
    """What one replica may use."""

    number: int
    gpus: tuple[str, ...]  # as CUDA_VISIBLE_DEVICES names them; empty on a CPU machine
    cpus: frozenset[int]
    memory_share: float  # of the machine's free memory, in what lies in main memory

    @property
    def environment(self) -> dict[str, str]:
        """What the replica's process is told."""
        told = {"BASIC_REPLICAS": "1", "BASIC_MEMORY_SHARE": f"{self.memory_share:.6g}"}
        if self.gpus:
            # By default CUDA counts the fastest GPU first; by bus, a number means the same GPU everywhere.
            told |= {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        return told


def place_replicas(
    replicas: int, ranks: int, environ: Mapping[str, str] = os.environ, root: Path = _ROOT
) -> list[Placement]:
    """Deal the machine out to `replicas` replicas of `ranks` ranks each; 0: as many replicas as its GPUs hold.

    With GPUs every rank has one of its own, and CPUs near them; without, replicas share the CPUs evenly. Raises
    SetupError, with what would fit, when there are too few GPUs.
    """
    gpus = visible_gpus(environ, root)
    if not gpus:
        return _on_cpus(replicas or 1, allowed_cpus())
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
        Placement(n, group, cpus, 1 / replicas)
        for n, (group, cpus) in enumerate(zip(groups, _near(groups, root), strict=True))
    ]


def visible_gpus(environ: Mapping[str, str] = os.environ, root: Path = _ROOT) -> list[str]:
    """Return the GPUs this process may use: CUDA_VISIBLE_DEVICES if set, else all the driver knows, by bus address."""
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
    """Return the CPUs of a kernel's list, like 0-3,8-11."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def _on_cpus(replicas: int, cpus: Sequence[int]) -> list[Placement]:
    return [Placement(n, (), group, 1 / replicas) for n, group in enumerate(_shares(replicas, cpus))]


def _shares(count: int, cpus: Sequence[int]) -> list[frozenset[int]]:
    """Deal CPUs out in runs of neighbours; with fewer CPUs than shares, several have the same one."""
    if count >= len(cpus):
        return [frozenset({cpus[n % len(cpus)]}) for n in range(count)]
    edges = [len(cpus) * n // count for n in range(count + 1)]
    return [frozenset(cpus[first:last]) for first, last in pairwise(edges)]


def _near(groups: Sequence[tuple[str, ...]], root: Path) -> list[frozenset[int]]:
    """Return the CPUs of each group: those on the memory node of its first GPU, shared evenly by the groups there."""
    allowed = allowed_cpus()
    homes = [tuple(sorted(_cpus_beside(group[0], root) & set(allowed)) or allowed) for group in groups]
    places: list[frozenset[int]] = []
    for number, home in enumerate(homes):
        neighbours = [n for n, other in enumerate(homes) if other == home]
        places.append(_shares(len(neighbours), home)[neighbours.index(number)])
    return places


def _cpus_beside(gpu: str, root: Path) -> set[int]:
    addresses = _bus_addresses(root)
    if not gpu.isdigit() or int(gpu) >= len(addresses):  # named by UUID, or unknown to the driver's list
        return set()
    try:
        return parse_cpu_list((root / "sys/bus/pci/devices" / addresses[int(gpu)] / "local_cpulist").read_text())
    except OSError:
        return set()


def _bus_addresses(root: Path) -> list[str]:
    folder = root / "proc/driver/nvidia/gpus"
    return sorted(path.name.lower() for path in folder.iterdir()) if folder.is_dir() else []
