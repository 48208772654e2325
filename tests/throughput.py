"""`python -m tests.throughput [TARGET]`: what one worker process on one core yields, and two on a core each, as JSON.

Real nodes on one PostgreSQL and one Redis-protocol server of their own. Needs a machine that does nothing else; the
load that it found is printed beside the rates. The default target is the embedded model.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from storage import schema
from tests.conftest import free_port, start_redis, stop
from tests.nodes import Cluster
from tests.postgres import Postgres
from worker.settings import WorkerSettings

REQUESTS, TOKENS = 64, 64
RUNS = 3


def tokens_per_s(cluster: Cluster, cores: list[int]) -> list[float]:
    """Return the rates of a few jobs, by the record's own clock, once every node serves."""
    before = len(cluster.workers())
    with ExitStack() as nodes:
        for core in cores:
            node = nodes.enter_context(cluster.node(threads=1, max_sequences=8, cache_dir=WorkerSettings().cache_dir))
            os.sched_setaffinity(node.pid, {core})
        cluster.until(lambda: len(cluster.workers()) == before + len(cores))
        jobs = [cluster.finished(cluster.submit(REQUESTS, max_tokens=TOKENS)) for _ in range(RUNS)]
    return [job.completion_tokens / ((job.finished_at or 0) - job.created_at) for job in jobs]


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert len(cores) == 2, "two cores are needed"
    postgres = Postgres()
    postgres.start()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = start_redis(port, Path(folder))
        try:
            url = postgres.create("throughput")
            schema.upgrade(url)
            cluster = Cluster(url, f"redis://127.0.0.1:{port}/0", Path(target), Path(folder))
            load = os.getloadavg()[0]
            one = tokens_per_s(cluster, cores[:1])
            two = tokens_per_s(cluster, cores)
        finally:
            stop(server)
            postgres.remove()
    print(json.dumps({"load_before": load, "one": one, "two": two, "ratio": max(two) / max(one)}, indent=1))


if __name__ == "__main__":
    main()
