"""Several workers on one database and queue: replicas under a supervisor, and independent nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import schema
from tests.databases import drop_schema
from tests.models import save_tiny
from tests.nodes import Cluster
from tests.processes import children_of, ended

_COMMIT_S = 0.1  # time in which a commit that was sent completes


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen2")


@pytest.fixture
def cluster(tmp_path: Path, target: Path, redis_url: str) -> Cluster:
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    schema.upgrade(url)
    return Cluster(url, redis_url, target, tmp_path)


def test_replicas_share_a_job_a_dead_one_is_started_again_and_a_stop_drains_all(cluster: Cluster) -> None:
    with cluster.node(replicas=2, max_sequences=4, lease_s=3) as supervisor:
        workers = cluster.until(lambda: len(cluster.workers()) == 2 and cluster.workers())
        pids = {worker.pid for worker in workers}
        assert pids == set(children_of(supervisor.pid))
        if len(os.sched_getaffinity(0)) > 1:
            assert os.sched_getaffinity(workers[0].pid).isdisjoint(os.sched_getaffinity(workers[1].pid))
        job = cluster.submit(40, max_tokens=120)
        cluster.until(lambda: {output.worker_id for output in cluster.outputs(job)} == {w.id for w in workers})
        os.kill(workers[0].pid, signal.SIGKILL)
        started_again = cluster.until(lambda: len(cluster.workers()) == 3 and cluster.workers()[-1])
        done = cluster.finished(job)
        assert (done.status, done.requests_completed) == ("completed", 40)
        assert [len(output.token_ids) for output in cluster.outputs(job)] == [120] * 40
        supervisor.terminate()
        assert supervisor.wait(840) == 0, cluster.words()
        assert ended(started_again.pid)
        assert [worker.pid for worker in cluster.workers()] == [workers[0].pid]  # the others stopped cleanly


def test_a_model_that_can_t_be_loaded_ends_the_supervisor_without_a_restart(cluster: Cluster) -> None:
    with cluster.node(target=f"{cluster.target},/no/such/model") as supervisor:
        assert supervisor.wait(840) == 78
    assert "model: there is no model directory /no/such/model" in cluster.words()
    assert cluster.workers() == [], "the other model of the worker did not serve"


@pytest.fixture
def shared(tmp_path: Path, target: Path, redis_url: str, postgresql_url: str) -> Iterator[Cluster]:
    """One PostgreSQL and one Redis-protocol server, shared by several nodes."""
    drop_schema(postgresql_url)
    schema.upgrade(postgresql_url)
    yield Cluster(postgresql_url, redis_url, target, tmp_path)
    drop_schema(postgresql_url)


def test_two_nodes_share_a_job_and_one_that_vanishes_loses_nothing(shared: Cluster) -> None:
    with shared.node(max_sequences=8, lease_s=3) as first, shared.node(max_sequences=8, lease_s=3):
        workers = shared.until(lambda: len(shared.workers()) == 2 and shared.workers())
        job = shared.submit(200, max_tokens=200)
        shared.until(lambda: {output.worker_id for output in shared.outputs(job)} == {w.id for w in workers})
        (victim,) = (worker.id for worker in workers if worker.pid == first.pid)
        shared.until(lambda: _is_caught_at_work(shared, first, victim))
        first.kill()
        done = shared.finished(job)
    assert (done.status, done.requests_completed, done.requests_failed) == ("completed", 200, 0)
    outputs = shared.outputs(job)
    assert [output.request_index for output in outputs] == list(range(200))
    assert {len(output.token_ids) for output in outputs} == {200}
    assert {output.worker_id for output in outputs} == {worker.id for worker in workers}
    assert shared.emitted(job) == 200 * 200
    assert max(shared.attempts(job)) >= 2, "what the victim held was taken up again"


def _is_caught_at_work(cluster: Cluster, node: subprocess.Popen[bytes], worker_id: str) -> bool:
    """Suspend a node; return whether it holds requests, and resume it if not."""
    node.send_signal(signal.SIGSTOP)
    time.sleep(_COMMIT_S)
    if cluster.held(worker_id):
        return True
    node.send_signal(signal.SIGCONT)
    return False
