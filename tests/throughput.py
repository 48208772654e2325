"""`python -m tests.throughput [TARGET]`: measure one worker process on one core, and two on a core each; print JSON.

Real nodes share a PostgreSQL and a Redis-protocol server. The scaling of the service is measured, so the nodes decode
plainly, and the default target is a random model that is bound by arithmetic: the embedded model is bound by memory
bandwidth, which the cores of a machine share. Run it on an idle machine; each rate comes with the share of their cores
that the nodes got.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from storage import schema
from tests.conftest import free_port, start_redis, stop
from tests.models import save_tiny
from tests.nodes import Cluster
from tests.postgres import Postgres
from tests.processes import children_of
from worker.settings import WorkerSettings

REQUESTS, TOKENS = 256, 64
SEQUENCES = 32  # of each node: enough rows to be bound by arithmetic
JOBS, ROUNDS = 2, 3  # alternating, so that a slow minute of the machine affects both
_NODE = {"threads": 1, "max_sequences": SEQUENCES, "mode": "plain"}
_SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8}


@dataclass(frozen=True)
class Rate:
    """Measured rate of a job."""

    tokens_per_s: float
    cpu_share: float  # share of their cores that the nodes got; other processes had the rest


def rates(cluster: Cluster, cores: list[int]) -> list[Rate]:
    """Return the rates of a few jobs by the database's clock, after every node serves."""
    before = len(cluster.workers())
    with ExitStack() as nodes:
        pids = []
        for core in cores:
            node = nodes.enter_context(cluster.node(**_NODE, cache_dir=WorkerSettings().cache_dir))
            os.sched_setaffinity(node.pid, {core})
            pids.append(node.pid)
        cluster.until(lambda: len(cluster.workers()) == before + len(cores))
        pids += [child for pid in pids for child in children_of(pid)]  # request processes
        return [_rate(cluster, pids, len(cores)) for _ in range(JOBS)]


def _rate(cluster: Cluster, pids: list[int], nodes: int) -> Rate:
    used_s = sum(map(_cpu_s, pids))
    job = cluster.finished(cluster.submit(REQUESTS, max_tokens=TOKENS))
    used_s = sum(map(_cpu_s, pids)) - used_s
    took_s = (job.finished_at or 0) - job.created_at
    return Rate(round(job.completion_tokens / took_s), round(used_s / took_s / nodes, 2))


def _cpu_s(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert len(cores) == 2, "two cores are needed"
    postgres = Postgres()
    postgres.start()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = start_redis(port, Path(folder))
        try:
            target = Path(sys.argv[1]) if len(sys.argv) > 1 else save_tiny(Path(folder) / "model", "llama", 0, **_SHAPE)
            url = postgres.create("throughput")
            schema.upgrade(url)
            cluster = Cluster(url, f"redis://127.0.0.1:{port}/0", target, Path(folder))
            load = os.getloadavg()[0]
            one: list[Rate] = []
            two: list[Rate] = []
            for _ in range(ROUNDS):
                one += rates(cluster, cores[:1])
                two += rates(cluster, cores)
        finally:
            stop(server)
            postgres.remove()
    ratio = max(rate.tokens_per_s for rate in two) / max(rate.tokens_per_s for rate in one)
    said = {"load_before": load, "load_after": os.getloadavg()[0], "ratio": round(ratio, 2)}
    print(json.dumps(said | {"one": [asdict(rate) for rate in one], "two": [asdict(rate) for rate in two]}))


if __name__ == "__main__":
    main()
