"""Tensor parallel replicas as processes that communicate over gloo: same texts, same trees, clean exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storage import schema
from tests.models import packed, save_tiny, tiny
from tests.nodes import Cluster
from tests.processes import child_that_runs, ended
from tests.split import texts

BASIC = Path(sys.executable).with_name("basic")


def save(directory: Path, seed: int) -> Path:
    tiny("llama", seed).save_pretrained(directory)
    return directory


def decoded_by_two_ranks(target: Path, draft: Path, folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.split"]
    arguments = [str(folder / "store"), str(target), str(draft)]
    ranks = [subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=840)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(words.splitlines()[-1]) for words in said]


def test_two_ranks_write_the_text_of_one_rank_and_see_the_same_trees_even_if_the_follower_computes_noise(
    tmp_path: Path,
) -> None:
    target, draft = save(tmp_path / "target", 0), save(tmp_path / "draft", 0)
    first, second = decoded_by_two_ranks(target, draft, tmp_path)
    whole = packed(tiny("llama", 0), capacity=512)
    assert first["texts"] == list(texts(whole, None))
    assert first["commands"] == second["commands"]
    forwards = [command for command in first["commands"] if command.startswith("FORWARD")]
    assert {command.split()[0] for command in forwards} == {"FORWARD0", "FORWARD1"}


@pytest.fixture
def cluster(tmp_path: Path, redis_url: str) -> Cluster:
    url = f"sqlite:///{tmp_path / 'basic.sqlite3'}"
    schema.upgrade(url)
    return Cluster(url, redis_url, save_tiny(tmp_path / "tiny", "qwen2"), tmp_path)


def follower_of(replica: int) -> int:
    """Return the second rank; the replica has a request process, too."""
    return child_that_runs("worker.node.rank_main", replica)


@pytest.mark.long
def test_a_killed_rank_ends_its_replica_and_the_next_one_continues_the_same_texts(cluster: Cluster) -> None:
    with cluster.node(replicas=1, lease_s=3):
        cluster.until(cluster.workers)
        undisturbed = cluster.submit(6, max_tokens=200)
        cluster.finished(undisturbed)
    with cluster.node(tp=2, replicas=1, lease_s=3, threads=1) as replica:
        worker = cluster.until(lambda: [w for w in cluster.workers() if w.pid == replica.pid])[0]
        assert worker.devices == ["cpu (1 threads)"] * 2
        follower = follower_of(replica.pid)
        job = cluster.submit(6, max_tokens=200)
        cluster.until(lambda: cluster.job(job).completion_tokens)
        os.kill(follower, signal.SIGKILL)
        assert replica.wait(840) == 75, cluster.words()
        assert not cluster.job(job).finished_at, "the replica was gone before the job ended"
    with cluster.node(tp=2, replicas=1, lease_s=3, threads=1) as replica:
        done = cluster.finished(job)
        assert (done.status, done.requests_completed) == ("completed", 6)
        assert [o.text for o in cluster.outputs(job)] == [o.text for o in cluster.outputs(undisturbed)]
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
