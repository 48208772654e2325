"""Tensor parallel replicas as processes that communicate over gloo: same texts, same trees, clean exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.messages import GenerationRequest, SamplingParameters
from storage import schema
from tests.models import packed, save_tiny, tiny
from tests.nodes import Cluster
from tests.processes import child_that_runs, ended
from tests.split import texts
from worker.engine.model.backend import fuse_layers
from worker.generate import generate
from worker.loading.loader import load_engine
from worker.loading.model_store import resolve
from worker.settings import WorkerSettings

BASIC = Path(sys.executable).with_name("basic")
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


def save(directory: Path, seed: int) -> Path:
    tiny("llama", seed, **HEADS).save_pretrained(directory)
    return directory


def decoded(target: Path, draft: Path, folder: Path, *cases: tuple[int, str]) -> list[list[dict[str, Any]]]:
    """Return what the ranks of each case, a number of ranks and a dtype, wrote."""
    words = [str(word) for case in cases for word in case]
    command = [sys.executable, "-m", "tests.split", str(folder), str(target), str(draft), *words]
    subprocess.run(command, check=True, timeout=840)
    return [[json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n, _ in cases]


def test_ranks_write_the_text_of_one_rank_and_see_the_same_trees_even_if_followers_compute_noise(
    tmp_path: Path,
) -> None:
    target, draft = save(tmp_path / "target", 0), save(tmp_path / "draft", 0)
    cases = ((2, "float32"), (4, "bfloat16"))
    for (_, dtype), (leader, *followers) in zip(cases, decoded(target, draft, tmp_path, *cases), strict=True):
        model = tiny("llama", 0, **HEADS).to(getattr(torch, dtype))
        fuse_layers(model)
        assert leader["texts"] == list(texts(packed(model, capacity=512), None))
        assert all(follower["commands"] == leader["commands"] for follower in followers)
        forwards = {command.split()[0] for command in leader["commands"] if command.startswith("FORWARD")}
        assert forwards == {"FORWARD0", "FORWARD1"}


@pytest.fixture
def cluster(tmp_path: Path, redis_url: str) -> Cluster:
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    schema.upgrade(url)
    return Cluster(url, redis_url, save_tiny(tmp_path / "tiny", "qwen2"), tmp_path)


def follower_of(replica: int) -> int:
    """Return the second rank; the replica has a request process, too."""
    return child_that_runs("worker.node.rank_main", replica)


def on_one_rank(target: Path | str, dtype: str, **sampling: Any) -> list[str]:
    """Return the texts of six requests of `Cluster.submit`, decoded on one rank in this process, one by one."""
    parameters = SamplingParameters(**{"temperature": 0.0, "seed": 0, "ignore_eos": True} | sampling)
    loaded = load_engine(WorkerSettings(target=str(target), dtype=dtype, draft="suffix", max_sequences=1))
    requests = [
        GenerationRequest(model=str(target), prompt=f"Request {number}", sampling=parameters) for number in range(6)
    ]
    return [generate(loaded, request).text for request in requests]


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (3, "bfloat16")])
def test_a_killed_rank_ends_its_replica_and_the_next_one_continues_the_same_texts(
    cluster: Cluster, ranks: int, dtype: str
) -> None:
    """Two ranks of the tiny model; three of SmolLM2, which has three KV heads."""
    if ranks == 3:
        cluster = replace(cluster, target=Path(resolve("smollm2-135m-instruct", WorkerSettings().cache_dir)))
    sampled: dict[str, Any] = {"temperature": 0.8, "seed": 5}
    tokens, sampled = (200, {}) if ranks == 2 else (80, sampled)
    settings = {"replicas": 1, "lease_s": 3, "dtype": dtype}
    undisturbed = on_one_rank(cluster.target, dtype, max_tokens=tokens, **sampled)
    with cluster.node(tp=ranks, threads=1, **settings) as replica:
        worker = cluster.until(lambda: [w for w in cluster.workers() if w.pid == replica.pid])[0]
        assert worker.devices == ["cpu (1 threads)"] * ranks
        follower = follower_of(replica.pid)
        job = cluster.submit(6, max_tokens=tokens, **sampled)
        cluster.until(lambda: cluster.job(job).completion_tokens)
        os.kill(follower, signal.SIGKILL)
        assert replica.wait(840) == 75, cluster.words()
        assert not cluster.job(job).finished_at, "the replica was gone before the job ended"
    with cluster.node(tp=ranks, threads=1, **settings) as replica:
        done = cluster.finished(job)
        assert (done.status, done.requests_completed) == ("completed", 6)
        assert [o.text for o in cluster.outputs(job)] == undisturbed
        follower = follower_of(replica.pid)
        replica.terminate()
        assert replica.wait(840) == 0, cluster.words()
        assert ended(follower)


def test_heads_that_cannot_be_split_are_refused_with_advice(cluster: Cluster) -> None:
    command = [str(BASIC), "generate", "Hello", "--max-tokens", "1"]
    done = subprocess.run(command, env=cluster.environment(tp=4), capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "6 heads over 2 KV heads can't be split over 4 ranks; use --tp 1 or 2" in done.stderr


SEED = """
import json, os
from worker import generate_with_speculative_decoding as drafted, generate_with_standard_model as plain
from worker import generate_with_streaming_speculative_decoding as streamed
from tests.processes import children_of
texts = [plain("Hello", 12), drafted("Hello", 12, use_parallel=True), "".join(streamed("Hello", 12, use_parallel=True))]
print(json.dumps([texts, len(children_of(os.getpid()))]))
"""


def test_the_seeds_functions_run_over_several_processes_and_write_the_same_text(cluster: Cluster) -> None:
    command = [sys.executable, "-c", SEED]
    done = subprocess.run(command, env=cluster.environment(threads=1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    texts_written, others = json.loads(done.stdout)
    assert len(set(texts_written)) == 1
    assert texts_written[0]
    assert others == min(2, len(os.sched_getaffinity(0))) - 1  # the model has two KV heads
