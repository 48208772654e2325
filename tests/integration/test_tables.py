"""A large table goes through the real service and comes back, although the client is killed twice on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.chaos.stack import Stack
from tests.ports import free_port

ROWS = 20_000
NOTE = "n" * 2_000  # kept with each row, so that the submission is uploaded in parts


@pytest.fixture
def stack(tmp_path: Path, tiny_target: Path) -> Iterator[Stack]:
    """A service with a tiny model."""
    made = Stack(tmp_path / "stack", tiny_target, None, workers=1, step_s=0.0)
    made.environment |= {"BASIC_MAX_SEQUENCES": "64", "XDG_STATE_HOME": str(tmp_path / "state")}
    made.start()
    yield made
    made.stop()


@pytest.fixture(params=["file", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, stack: Stack) -> Iterator[str]:
    """The URL of a folder: on the disk, or in a bucket of a local server that speaks S3."""
    if request.param == "file":
        yield tmp_path.as_uri()
        return
    pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs 'moto[s3,server]'")
    server = pytest.importorskip("moto.server", reason="needs moto: pip install s3fs 'moto[s3,server]'")
    moto = server.ThreadedMotoServer(port=free_port())
    moto.start()
    host, port = moto.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "a", "AWS_DEFAULT_REGION": "us-east-1"}
    stack.environment |= keys | {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }
    os.environ |= {name: stack.environment[name] for name in (*keys, "AWS_ENDPOINT_URL")}
    import s3fs

    s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}").mkdir("jobs")
    yield "s3://jobs"
    moto.stop()


def basic(stack: Stack, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.cli", *arguments]


def run(stack: Stack, *arguments: str) -> str:
    done = subprocess.run(basic(stack, *arguments), env=stack.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_when(stack: Stack, condition: Callable[[], bool], *arguments: str) -> None:
    """Start a command, and kill it once the condition holds."""
    process = subprocess.Popen(basic(stack, *arguments), env=stack.environment, stdout=subprocess.DEVNULL)
    try:
        stack.wait_for(condition, "the moment to kill it", 900.0)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
        process.wait()


@pytest.mark.long
def test_twenty_thousand_rows_go_from_a_bucket_to_a_bucket(stack: Stack, bucket: str, tmp_path: Path) -> None:
    import fsspec

    table: dict[str, list[Any]] = {
        "id": list(range(ROWS)),
        "text": [f"river {n}" for n in range(ROWS)],
        "note": [f"{n} {NOTE}" for n in range(ROWS)],
    }
    with fsspec.open(f"{bucket}/in.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table(table), file)
    submit = ["submit", f"{bucket}/in.parquet", "--template", "Name {text}.", "--id-column", "id", "--keep", "note,id"]
    submit += ["--max-tokens", "3", "--json"]

    def parts() -> int:
        return sum(len(json.loads(path.read_text())["part_ids"]) for path in tmp_path.glob("state/**/*.json"))

    kill_when(stack, lambda: parts() >= 1, *submit)
    job = json.loads(run(stack, *submit))
    assert job["request_counts"]["total"] == ROWS
    assert stack.rows("SELECT count(*) FROM jobs") == [(1,)]

    stack.wait_for(lambda: stack.rows("SELECT requests_completed > 500 FROM jobs") == [(1,)], "500 answers", 600.0)
    stack.kill("worker-0", signal.SIGKILL)
    fetch = ["results", "--follow", "-o", f"{bucket}/out.parquet", job["id"]]
    kill_when(stack, lambda: stack.rows("SELECT requests_completed > 2000 FROM jobs") == [(1,)], *fetch)
    assert not fsspec.filesystem(bucket.partition(":")[0]).exists(f"{bucket}/out.parquet"), "no partial file"
    stack.wait_for(lambda: stack.rows("SELECT status FROM jobs") == [("completed",)], "the end of the job", 900.0)
    run(stack, *fetch)

    with fsspec.open(f"{bucket}/out.parquet", "rb") as file:
        answers = pyarrow.parquet.read_table(file).sort_by("id").to_pydict()
    assert answers["id"] == table["id"]
    assert answers["custom_id"] == [str(n) for n in table["id"]]
    assert answers["note"] == table["note"]
    assert set(answers["completion_tokens"]) <= {1, 2, 3}
    assert all(text is not None for text in answers["text"])
