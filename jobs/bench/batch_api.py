"""Measure the API server with a large batch: `python -m jobs.bench.batch_api`.

Runs the real API server, ingest process and Redis server with SQLite, without worker or model. Each measurement is a
function that takes the running service and returns numbers by name; add new ones to MEASUREMENTS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from jobs.local.startup import Startup
from jobs.messages import CHAT_ENDPOINT, model_name
from jobs.processes import Children
from jobs.settings import JobsSettings

_TICK_S: Final = 0.2
_TIMEOUT_S: Final = 900.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Size of the measured batch."""

    lines: int = 50_000
    file_bytes: int = 200_000_000
    polls: int = 200


@dataclass(slots=True)
class RunningService:
    """The running processes, and results that one measurement passes to the next."""

    http: httpx.Client
    model: str
    pids: dict[str, int]
    scale: Scale
    directory: Path
    file_id: str = ""
    batch_id: str = ""
    seen: dict[str, Any] = field(default_factory=dict)


Measurement = Callable[[RunningService], dict[str, Any]]


def measure_upload(service: RunningService) -> dict[str, Any]:
    """Upload the file: time and memory."""
    path = _write_input(service)
    with Rss(service.pids["api"]) as rss, path.open("rb") as content:
        began_at = time.monotonic()
        reply = service.http.post("/v1/files", data={"purpose": "batch"}, files={"file": (path.name, content)})
        file = _ok(reply)
        seconds = time.monotonic() - began_at
    assert file["bytes"] == path.stat().st_size
    service.file_id = file["id"]
    return {"upload_bytes": file["bytes"], "upload_s": seconds, "upload_server_rss_mb": rss.peak_mb}


def measure_validation(service: RunningService) -> dict[str, Any]:
    """Create a batch of the file and wait until it is validated, polling the API server for its latency."""
    order = {"input_file_id": service.file_id, "endpoint": CHAT_ENDPOINT, "completion_window": "24h"}
    waits_ms: list[float] = []
    with Rss(service.pids["ingest"]) as rss:
        began_at = time.monotonic()
        batch = _ok(service.http.post("/v1/batches", json=order))
        while batch["status"] == "validating":
            if time.monotonic() - began_at > _TIMEOUT_S:
                raise SystemExit("the batch was not validated in time")
            time.sleep(_TICK_S)
            asked_at = time.monotonic()
            batch = _ok(service.http.get(f"/v1/batches/{batch['id']}"))
            waits_ms.append(1000 * (time.monotonic() - asked_at))
        seconds = time.monotonic() - began_at
    assert batch["request_counts"]["total"] == service.scale.lines, batch["errors"]
    service.batch_id = batch["id"]
    return {
        "validation_s": seconds,
        "validation_ingest_rss_mb": rss.peak_mb,
        "poll_while_validating_median_ms": statistics.median(waits_ms),
        "poll_while_validating_max_ms": max(waits_ms),
    }


def measure_polls(service: RunningService) -> dict[str, Any]:
    """Poll the large job: latency."""
    waits_ms = []
    for _ in range(service.scale.polls):
        asked_at = time.monotonic()
        _ok(service.http.get(f"/v1/jobs/{service.batch_id}"))
        waits_ms.append(1000 * (time.monotonic() - asked_at))
    waits_ms.sort()
    return {"poll_median_ms": statistics.median(waits_ms), "poll_p99_ms": waits_ms[int(0.99 * len(waits_ms))]}


def measure_download(service: RunningService) -> dict[str, Any]:
    """Download the whole file: time and memory."""
    size = 0
    with Rss(service.pids["api"]) as rss:
        began_at = time.monotonic()
        with service.http.stream("GET", f"/v1/files/{service.file_id}/content") as reply:
            for data in reply.iter_bytes():
                size += len(data)
        seconds = time.monotonic() - began_at
    return {"download_bytes": size, "download_s": seconds, "download_server_rss_mb": rss.peak_mb}


def measure_cancel(service: RunningService) -> dict[str, Any]:
    """Cancel the batch and wait for its error file, which has one line per request."""
    began_at = time.monotonic()
    batch = _ok(service.http.post(f"/v1/batches/{service.batch_id}/cancel"))
    answered_s = time.monotonic() - began_at
    with Rss(service.pids["ingest"]) as rss:
        while batch["status"] != "cancelled":
            if time.monotonic() - began_at > _TIMEOUT_S:
                raise SystemExit("the batch's files were not written in time")
            time.sleep(_TICK_S)
            batch = _ok(service.http.get(f"/v1/batches/{service.batch_id}"))
    lines = service.http.get(f"/v1/files/{batch['error_file_id']}/content").content.count(b"\n")
    assert lines == service.scale.lines
    seconds = time.monotonic() - began_at
    return {"cancel_answer_s": answered_s, "cancelled_and_filed_s": seconds, "filing_ingest_rss_mb": rss.peak_mb}


MEASUREMENTS: Final[tuple[Measurement, ...]] = (
    measure_upload,
    measure_validation,
    measure_polls,
    measure_download,
    measure_cancel,
)


class Rss:
    """Measures the peak resident memory (MB) of a process inside the block, five times per second."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_mb = 0.0

    def __enter__(self) -> Rss:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            for line in self._status.read_text().splitlines():
                if line.startswith("VmRSS"):
                    self.peak_mb = max(self.peak_mb, int(line.split()[1]) / 1000)
            if self._stop.wait(_TICK_S):
                return


@contextmanager
def run_service(directory: Path, scale: Scale) -> Iterator[RunningService]:
    """Run the service without a worker, in its own directory, inside the block."""
    (directory / "logs").mkdir()
    settings = JobsSettings(data_dir=directory, api_port=0)
    children = Children()
    try:
        settings, pids = Startup(settings, children, threading.Event()).run_without_worker()
        with httpx.Client(base_url=settings.api_url, timeout=_TIMEOUT_S, trust_env=False) as http:
            yield RunningService(http, model_name(settings.target), pids, scale, directory)
    finally:
        children.stop(threading.Event())


def measure(scale: Scale) -> dict[str, Any]:
    """Run all measurements and return their numbers by name."""
    numbers: dict[str, Any] = {"lines": scale.lines}
    with (
        tempfile.TemporaryDirectory(prefix="basic-bench-") as directory,
        run_service(Path(directory), scale) as service,
    ):
        for measurement in MEASUREMENTS:
            numbers |= measurement(service)
    return numbers


def main() -> int:
    """Run the measurements and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.batch_api", description="Measure the API server.")
    parser.add_argument("--lines", type=int, default=Scale().lines, help="requests in the batch")
    parser.add_argument("--megabytes", type=float, default=Scale().file_bytes / 1e6, help="size of the file, MB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    numbers = measure(Scale(given.lines, int(given.megabytes * 1e6)))
    if given.json:
        print(json.dumps(numbers))
        return 0
    for name, value in numbers.items():
        print(f"{name:<34} {value:,.1f}" if isinstance(value, float) else f"{name:<34} {value:,}")
    return 0


def _write_input(service: RunningService) -> Path:
    """Write a batch file with `scale.lines` lines and about `scale.file_bytes` bytes."""
    path = service.directory / "input.jsonl"
    with path.open("w") as file:
        empty = _line(service.model, 0, "")
        filler = "word " * ((service.scale.file_bytes // service.scale.lines - len(empty)) // 5 - 2)
        for index in range(service.scale.lines):
            file.write(_line(service.model, index, filler))
    return path


def _line(model: str, index: int, content: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": f"{index:08} {content}"}], "max_tokens": 8}
    return json.dumps({"custom_id": f"request-{index:08}", "method": "POST", "url": CHAT_ENDPOINT, "body": body}) + "\n"


def _ok(reply: httpx.Response) -> dict[str, Any]:
    if not reply.is_success:
        raise SystemExit(f"{reply.request.method} {reply.request.url} returned {reply.text[:500]}")
    answer: dict[str, Any] = reply.json()
    return answer


if __name__ == "__main__":
    sys.exit(main())
