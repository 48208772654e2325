"""One worker with two models on one device: exact texts, fair turns, and a crash that stays with its model."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.messages import GenerationRequest, SamplingParameters
from storage import schema
from tests.models import save_tiny
from tests.nodes import Cluster
from tests.processes import children_of
from worker.generate import generate
from worker.loading.loader import load_engine
from worker.settings import WorkerSettings

MODELS = ("qwen", "llama")
CONTEXT_TOKENS, TOKENS = 128, 60


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny(folder / "qwen", "qwen2"), save_tiny(folder / "llama", "llama", seed=1)]


@pytest.fixture
def cluster(tmp_path: Path, targets: list[Path], redis_url: str) -> Cluster:
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    schema.upgrade(url)
    return Cluster(url, redis_url, ",".join(map(str, targets)), tmp_path)


def test_two_models_of_one_worker_write_what_each_writes_alone(cluster: Cluster, targets: list[Path]) -> None:
    with cluster.node(max_sequences=4, max_context=CONTEXT_TOKENS) as supervisor:
        workers = cluster.until(lambda: len(cluster.workers()) == 2 and cluster.workers())
        assert {worker.target for worker in workers} == set(MODELS)
        assert {worker.pid for worker in workers} == set(children_of(supervisor.pid))
        jobs = {
            (model, temperature): cluster.submit(6, model, max_tokens=TOKENS, temperature=temperature, seed=3)
            for model in MODELS
            for temperature in (0.0, 1.0)
        }
        done = [cluster.finished(job) for job in jobs.values()]
        supervisor.terminate()
        assert supervisor.wait(840) == 0, cluster.words()
    assert {(job.status, job.requests_completed) for job in done} == {("completed", 6)}
    assert cluster.workers() == [], "both stopped cleanly"
    for model, target in zip(MODELS, targets, strict=True):
        settings: dict[str, Any] = {"target": str(target), "cache_dir": cluster.data_dir, "max_context": CONTEXT_TOKENS}
        alone = load_engine(WorkerSettings(**settings, dtype="float32", draft="suffix"))
        for temperature in (0.0, 1.0):
            outputs = cluster.outputs(jobs[model, temperature])
            sampling = SamplingParameters(max_tokens=TOKENS, temperature=temperature, seed=3, ignore_eos=True)
            for number in (0, 5):
                request = GenerationRequest(model=model, prompt=f"Request {number}", sampling=sampling)
                assert generate(alone, request).token_ids == tuple(outputs[number].token_ids)


@pytest.mark.long
def test_a_process_that_is_killed_starts_again_and_the_other_model_is_not_disturbed(cluster: Cluster) -> None:
    with cluster.node(max_sequences=4, lease_s=3) as supervisor:
        workers = cluster.until(lambda: len(cluster.workers()) == 2 and cluster.workers())
        victim, neighbour = (next(w for w in workers if w.target == model) for model in MODELS)
        jobs = [cluster.submit(8, model, max_tokens=400) for model in MODELS]
        cluster.until(lambda: all(cluster.held(worker.id) for worker in workers))
        os.kill(victim.pid, signal.SIGKILL)
        assert {cluster.finished(job).requests_completed for job in jobs} == {8}
        assert {output.worker_id for output in cluster.outputs(jobs[1])} == {neighbour.id}
        assert cluster.attempts(jobs[1]) == {1}
        supervisor.terminate()
        assert supervisor.wait(840) == 0, cluster.words()
    assert [worker.id for worker in cluster.workers()] == [victim.id], "the others stopped cleanly"
