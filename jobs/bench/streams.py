"""Measure event streams: `python -m jobs.bench.streams` has many readers follow one job and checks what they receive.

The API server runs as a process of its own, with a real Redis server and SQLite. A thread of this process commits and
publishes like a worker. A third of the readers connects late, and a third reconnects with `Last-Event-ID`. At the end
the text of each reader is compared with SQL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import httpx

from jobs.local.redis_server import is_ready, server_arguments, server_binary
from jobs.local.startup import free_port
from jobs.messages import JobStatus, PartialEvent, Piece
from jobs.processes import python_module
from jobs.streaming.pubsub import Publisher
from storage import leases, queries, schema, writes
from storage.records import Checkpoint, Claim, FinishedChoice, NewJob, NewRequest, RequestProgress
from storage.session import Database
from storage.settings import sqlite_url
from storage.steps.columns import StepColumns

_START_S = 120.0
_JOB = "batch_benchmark"
_WORKER = "benchmark"
_WORDS = ("to ", "be ", "or ", "not ")  # text of one commit of one choice


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """Size of the benchmark."""

    readers: int = 500
    requests: int = 32  # running at once, as in one worker
    commits: int = 20
    interval_s: float = 0.5


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What the readers received, how far they were behind the last commit, and what the server used."""

    readers: int
    events_per_reader: int  # of a reader that was connected from the start
    readers_with_wrong_text: int  # whose text, number of finished events or status differs from SQL
    readers_with_duplicates: int  # that received an event id twice
    reconnected: int
    late: int
    written_in_s: float  # from the first commit to the last
    behind_p50_ms: float  # from the last commit to a reader's last event
    behind_max_ms: float
    server_rss_mb: float
    server_cpu_s: float


@dataclass(slots=True)
class _Reader:
    """A reader and the events it received, over one connection or two."""

    number: int
    received: list[bytes] = field(default_factory=list)
    last_id: str | None = None
    ended_at: float = 0.0
    reconnected: bool = False

    @property
    def kind(self) -> int:
        return self.number % 3  # 0: stays, 1: connects late, 2: reconnects


def measure(load: StreamLoad) -> StreamResult:
    """Run the benchmark in a temporary directory."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        data_dir = Path(directory)
        database_url = sqlite_url(data_dir / "basic.sqlite3")
        schema.upgrade(database_url)
        database = Database.open(database_url)
        stack.callback(database.dispose)
        redis_url = stack.enter_context(_redis(data_dir))
        api_url, server = stack.enter_context(_api_server(data_dir, database_url, redis_url))
        writer = _Writer(database, redis_url, load)
        readers = asyncio.run(_read_all(api_url, load, writer))
        rss_mb, cpu_s = _usage(server.pid)
        return _result(readers, writer, database, load, rss_mb, cpu_s)


class _Writer:
    """Commits and publishes tokens like a worker."""

    def __init__(self, database: Database, redis_url: str, load: StreamLoad) -> None:
        self._database = database
        self._redis_url = redis_url
        self._load = load
        self.began_at = 0.0
        self.ended_at = 0.0
        with database.write() as session:
            job = NewJob(_JOB, "benchmark", "/v1/completions", 86_400.0)
            writes.insert_job(session, job, [NewRequest(f"r{n}", body={"n": n}) for n in range(load.requests)])
        with database.write() as session:
            self._claims = leases.claim(session, _WORKER, "benchmark", load.requests, 600.0)

    def write(self, halfway: Callable[[], object]) -> None:
        """Commit and publish until the job has ended; call `halfway` after half of the commits."""
        publisher = Publisher(self._redis_url)
        self.began_at = time.monotonic()
        for number in range(1, self._load.commits + 1):
            time.sleep(self._load.interval_s)
            last = number == self._load.commits
            progress = [self._progress(claim, number, last) for claim in self._claims]
            with self._database.write() as session:
                writes.flush(session, _WORKER, 600.0, progress, [claim.lease for claim in self._claims])
            self.ended_at = time.monotonic()
            events = [self._event(claim, number) for claim in self._claims]
            end = [PartialEvent(job_id=_JOB, type="job", status=JobStatus.COMPLETED)] if last else []
            publisher.publish([*events, *end])
            if number == self._load.commits // 2:
                halfway()
        publisher.close()

    def _progress(self, claim: Claim, number: int, last: bool) -> RequestProgress:
        finished = FinishedChoice(
            choice_index=0,
            text="".join(_text(claim, n) for n in range(1, number + 1)),
            token_ids=tuple(range(len(_WORDS) * number)),
            finish_reason="stop",
            prompt_tokens=1,
            completion_tokens=len(_WORDS) * number,
            started_at=0.0,
            finished_at=1.0,
            last_seq=number + 1,
        )
        checkpoint = Checkpoint(
            choice_index=0,
            seq=number,
            token_ids=tuple(range(len(_WORDS))),
            accepted=(False,) * len(_WORDS),
            text=_text(claim, number),
            pieces=((_text(claim, number), "target"),),
            steps=StepColumns(),
        )
        return RequestProgress(claim.lease, (checkpoint,), (finished,) if last else (), ends=last)

    def _event(self, claim: Claim, number: int) -> PartialEvent:
        text = _text(claim, number)
        return PartialEvent(
            job_id=_JOB,
            request=claim.custom_id,
            index=claim.lease.request_index,
            seq=number,
            type="tokens",
            text=text,
            pieces=(Piece(text=text, source="target"),),
            tokens=len(_WORDS),
        )


def _text(claim: Claim, number: int) -> str:
    return f"[{claim.lease.request_index}.{number}] " + "".join(_WORDS)


async def _read_all(api_url: str, load: StreamLoad, writer: _Writer) -> list[_Reader]:
    readers = [_Reader(number) for number in range(load.readers)]
    all_connected, halfway = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    waiting = sum(reader.kind != 1 for reader in readers)

    def arrived() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0:
            all_connected.set()

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    client = httpx.AsyncClient(base_url=api_url, timeout=600.0, limits=limits, trust_env=False)
    async with client as http, asyncio.TaskGroup() as group:  # one failing reader ends the benchmark
        for reader in readers:
            group.create_task(_read(http, reader, arrived, halfway))
        await all_connected.wait()
        await asyncio.to_thread(writer.write, lambda: loop.call_soon_threadsafe(halfway.set))
    return readers


async def _read(http: httpx.AsyncClient, reader: _Reader, arrived: Callable[[], None], halfway: asyncio.Event) -> None:
    if reader.kind == 1:
        await halfway.wait()
    cut_after = 20 + reader.number if reader.kind == 2 else None  # events, different for each reader
    while True:
        blocks = _blocks(http, reader.last_id)
        async for block in blocks:
            if b"retry:" in block:
                if not reader.reconnected and reader.kind != 1:
                    arrived()
                continue
            if b"data: " not in block:
                continue
            reader.received.append(block)
            reader.last_id = _id(block) or reader.last_id
            if cut_after is not None and len(reader.received) >= cut_after:
                cut_after, reader.reconnected = None, True
                await blocks.aclose()
                break
        else:
            reader.ended_at = time.monotonic()
            return


async def _blocks(http: httpx.AsyncClient, last_id: str | None) -> AsyncGenerator[bytes]:
    headers = {"last-event-id": last_id} if last_id else {}
    async with http.stream("GET", f"/v1/jobs/{_JOB}/events", headers=headers) as response:
        response.raise_for_status()
        rest = b""
        async for part in response.aiter_bytes():
            *blocks, rest = (rest + part).split(b"\n\n")
            for block in blocks:
                yield block


def _id(block: bytes) -> str | None:
    head = block.partition(b"\n")[0]
    return head[4:].decode() if head.startswith(b"id: ") else None


def _result(
    readers: list[_Reader], writer: _Writer, database: Database, load: StreamLoad, rss_mb: float, cpu_s: float
) -> StreamResult:
    with database.read() as session:
        written = {view.request_index: view.choices[0].text for view in queries.outputs(session, _JOB)}
    behind_ms = [1000 * (reader.ended_at - writer.ended_at) for reader in readers]
    return StreamResult(
        readers=load.readers,
        events_per_reader=len(readers[0].received),
        readers_with_wrong_text=sum(not _is_right(reader, written) for reader in readers),
        readers_with_duplicates=sum(_is_doubled(reader) for reader in readers),
        reconnected=sum(reader.reconnected for reader in readers),
        late=sum(reader.kind == 1 for reader in readers),
        written_in_s=round(writer.ended_at - writer.began_at, 2),
        behind_p50_ms=round(median(behind_ms), 1),
        behind_max_ms=round(max(behind_ms), 1),
        server_rss_mb=rss_mb,
        server_cpu_s=cpu_s,
    )


def _is_right(reader: _Reader, written: dict[int, str]) -> bool:
    """Return whether a reader received all text in order, one finished event per request, and the final status."""
    texts: defaultdict[int, str] = defaultdict(str)
    seqs: defaultdict[int, int] = defaultdict(lambda: -1)
    ends: Counter[int] = Counter()
    status = None
    for block in reader.received:
        event = json.loads(block[block.index(b"data: ") + 6 :])
        if event["type"] == "tokens" and event["seq"] > seqs[event["index"]]:  # not repeated after a reconnect
            seqs[event["index"]] = event["seq"]
            before = "" if event["snapshot"] else texts[event["index"]]
            texts[event["index"]] = before + event["text"]
        elif event["type"] == "finished":
            ends[event["index"]] += 1
        status = event.get("status", status)
    return texts == written and ends == Counter(written.keys()) and status == "completed"


def _is_doubled(reader: _Reader) -> bool:
    ids = [event_id for block in reader.received if (event_id := _id(block))]
    return len(ids) != len(set(ids))


@contextmanager
def _redis(data_dir: Path) -> Iterator[str]:
    directory = data_dir / "redis"
    directory.mkdir()
    port = free_port("127.0.0.1")
    server = subprocess.Popen(server_arguments(server_binary(), port, directory), stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        _await(lambda: is_ready(url), server)
        yield url
    finally:
        server.terminate()
        server.wait()


@contextmanager
def _api_server(data_dir: Path, database_url: str, redis_url: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    ready_file = data_dir / "ready"
    own = {name: value for name, value in os.environ.items() if not name.startswith("BASIC_")}
    settings = {
        "BASIC_DATA_DIR": str(data_dir),
        "BASIC_DATABASE_URL": database_url,
        "BASIC_REDIS_URL": redis_url,
        "BASIC_API_PORT": "0",
    }
    arguments = [*python_module("jobs.api"), "--ready-file", str(ready_file)]
    server = subprocess.Popen(arguments, env=own | settings)
    try:
        _await(ready_file.exists, server)
        yield ready_file.read_text().strip(), server
    finally:
        server.terminate()
        server.wait()


def _await(is_there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start")
        time.sleep(0.05)


def _usage(pid: int) -> tuple[float, float]:
    """Return the peak memory (MB) and CPU time (s) of a process; zeros if this is not Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    peak_kb = int(status.partition("VmHWM:")[2].split()[0])
    return round(peak_kb / 1000, 1), round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)


def main() -> int:
    """Run the benchmark; exit status 1 if a reader received wrong or duplicate events."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.streams", description=__doc__)
    parser.add_argument("--readers", type=int, default=500)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--commits", type=int, default=20)
    parser.add_argument("--interval-s", type=float, default=0.5)
    arguments = parser.parse_args()
    result = measure(StreamLoad(arguments.readers, arguments.requests, arguments.commits, arguments.interval_s))
    print(json.dumps(asdict(result), indent=2))
    return int(result.readers_with_wrong_text or result.readers_with_duplicates)


if __name__ == "__main__":
    raise SystemExit(main())
