"""The faults. Each breaks a part of a running service; the service itself must recover."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
from redis.exceptions import RedisError

from jobs.celery_app import KEY_PREFIX, NOTIFY_TASK
from jobs.messages import model_queue
from storage.session import Database
from tests.chaos.request_process import MODULE
from tests.chaos.stack import Stack
from tests.processes import child_that_runs

Fault = Callable[[Stack, random.Random], None]

_LEASE_AND_MORE_S = 6.0
# Messages that Celery can't process: each ends its consumer.
_LETHAL_FRAMES = (b"\x80\x04garbage", b"7", b'{"body": "%%%", "properties": {"delivery_tag": "x"}}')


def kill_a_worker(stack: Stack, dice: random.Random) -> None:
    """Kill a worker during a step."""
    stack.kill(dice.choice(stack.workers()))


def kill_all_workers(stack: Stack, dice: random.Random) -> None:
    """Kill all workers at once, so that no other worker can detect the deaths."""
    for name in stack.workers():
        stack.kill(name)


def stop_a_worker(stack: Stack, dice: random.Random) -> None:
    """Stop a worker cleanly, as an upgrade does."""
    stack.kill(dice.choice(stack.workers()), signal.SIGTERM)


def stop_a_worker_twice(stack: Stack, dice: random.Random) -> None:
    """Stop a worker with two signals: the second makes it exit at once."""
    name = dice.choice(stack.workers())
    stack.kill(name, signal.SIGTERM)
    stack.rest(0.05)
    stack.kill(name, signal.SIGTERM)


def freeze_a_worker(stack: Stack, dice: random.Random) -> None:
    """Suspend a worker for longer than its lease, then let it continue."""
    name = dice.choice(stack.workers())
    stack.kill(name, signal.SIGSTOP)
    stack.rest(_LEASE_AND_MORE_S)
    stack.kill(name, signal.SIGCONT)


def kill_a_request_process(stack: Stack, dice: random.Random) -> None:
    """Kill the request process of a worker."""
    _signal_request_process(stack, dice, signal.SIGKILL)


def freeze_a_request_process(stack: Stack, dice: random.Random) -> None:
    """Freeze the request process of a worker for longer than its leases, then let it continue."""
    child = _signal_request_process(stack, dice, signal.SIGSTOP)
    stack.rest(_LEASE_AND_MORE_S)
    if child is not None:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)


def restart_redis(stack: Stack, dice: random.Random) -> None:
    """Kill the Redis server and start it again with its data."""
    with stack.without_redis(lose_data=False):
        stack.rest(dice.uniform(0.2, 3.0))


def replace_redis(stack: Stack, dice: random.Random) -> None:
    """Kill the Redis server and start an empty one."""
    with stack.without_redis(lose_data=True):
        stack.rest(dice.uniform(0.2, 3.0))


def flush_redis(stack: Stack, dice: random.Random) -> None:
    """Delete all keys of the Redis server while clients are connected."""
    with stack.redis() as client:
        client.flushall()


def cut_redis_connections(stack: Stack, dice: random.Random) -> None:
    """Close every connection to the Redis server but our own."""
    with stack.redis() as client:
        client.client_kill_filter(skipme=True, _type="normal")
        client.client_kill_filter(skipme=True, _type="pubsub")


def hang_redis(stack: Stack, dice: random.Random) -> None:
    """Suspend the Redis server; its connections stay open."""
    stack.kill("redis", signal.SIGSTOP)
    stack.rest(dice.uniform(1.0, 4.0))
    stack.kill("redis", signal.SIGCONT)


def repeat_doorbells(stack: Stack, dice: random.Random) -> None:
    """Notify workers fifty times of a job that may have ended."""
    with stack.redis() as client:
        queue = KEY_PREFIX + model_queue(Path(stack.environment["BASIC_TARGET"]).name)
        client.lpush(queue, *[_doorbell("batch_nobody_knows", number) for number in range(50)])


def hold_doorbells_back(stack: Stack, dice: random.Random) -> None:
    """Remove the queued messages from Redis, and put them back later."""
    with stack.redis() as client:
        held: dict[bytes, list[bytes]] = {}
        ends_at = time.monotonic() + 2.0
        while time.monotonic() < ends_at:
            for key in client.keys(KEY_PREFIX + "basic.*"):
                while (message := _pop(client, key)) is not None:
                    held.setdefault(key, []).append(message)
            stack.rest(0.05)
        for key, messages in held.items():
            client.lpush(key, *messages)


def send_garbage(stack: Stack, dice: random.Random) -> None:
    """Queue bytes that end a Celery consumer."""
    with stack.redis() as client:
        client.lpush(KEY_PREFIX + model_queue(Path(stack.environment["BASIC_TARGET"]).name), *_LETHAL_FRAMES)


def kill_the_api_server(stack: Stack, dice: random.Random) -> None:
    """Kill the API server."""
    stack.kill("api")


def kill_the_ingest(stack: Stack, dice: random.Random) -> None:
    """Kill the ingest process."""
    stack.kill("ingest")


def restart_the_database(stack: Stack, dice: random.Random) -> None:
    """Stop PostgreSQL at once, as a crash does, and start it again."""
    assert stack.postgres is not None
    stack.postgres.stop(signal.SIGQUIT)
    stack.rest(dice.uniform(0.5, 5.0))
    stack.postgres.start()


def cut_database_connections(stack: Stack, dice: random.Random) -> None:
    """Close every connection to PostgreSQL during its transaction."""
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'chaos'"
        )


def lock_the_database(stack: Stack, dice: random.Random) -> None:
    """Hold SQLite's write lock from outside for longer than a writer waits."""
    database = Database.open(stack.database_url)
    with database.write():
        stack.rest(12.0)
    database.dispose()


def fill_the_disk(stack: Stack, dice: random.Random) -> None:
    """Fill the disk of the database for a while."""
    ballast = stack.disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    stack.rest(4.0)
    ballast.unlink()


ANYWHERE: Mapping[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        kill_a_worker,
        kill_all_workers,
        stop_a_worker,
        stop_a_worker_twice,
        freeze_a_worker,
        kill_a_request_process,
        freeze_a_request_process,
        restart_redis,
        replace_redis,
        flush_redis,
        cut_redis_connections,
        hang_redis,
        repeat_doorbells,
        hold_doorbells_back,
        send_garbage,
        kill_the_api_server,
        kill_the_ingest,
    )
}
ON_POSTGRESQL: Mapping[str, Fault] = {
    "restart the database": restart_the_database,
    "cut database connections": cut_database_connections,
}
ON_SQLITE: Mapping[str, Fault] = {"lock the database": lock_the_database}
ON_A_SMALL_DISK: Mapping[str, Fault] = {"fill the disk": fill_the_disk}


def faults_for(*, postgres: bool, small_disk: bool) -> dict[str, Fault]:
    """Return the faults that apply to this kind of service."""
    return {
        **ANYWHERE,
        **(ON_POSTGRESQL if postgres else ON_SQLITE),
        **(ON_A_SMALL_DISK if small_disk and not postgres else {}),
    }


@contextmanager
def small_disk(directory: Path, megabytes: int = 128) -> Iterator[bool]:
    """Mount a disk of a few megabytes at `directory`; yield False where that is not permitted."""
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "basic-chaos", str(directory)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(directory)], capture_output=True, check=False)


def _signal_request_process(stack: Stack, dice: random.Random, number: signal.Signals) -> int | None:
    """Send a signal to the request process of a worker; return its process id, None if there is none."""
    with suppress(ProcessLookupError, FileNotFoundError, LookupError):
        child = child_that_runs(MODULE, stack.children[dice.choice(stack.workers())].pid)
        os.kill(child, number)
        return child
    return None


def _pop(client: Any, key: bytes) -> bytes | None:
    try:
        popped = client.rpop(key)
    except RedisError:  # not a list: a key of Celery itself
        return None
    return popped if isinstance(popped, bytes) else None


def _doorbell(job_id: str, number: int) -> str:
    """A message as Celery writes it."""
    body = base64.b64encode(json.dumps([[], {"job_id": job_id}, {}]).encode()).decode()
    tag = f"chaos-{os.getpid()}-{time.monotonic_ns()}-{number}"
    return json.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"lang": "py", "task": NOTIFY_TASK, "id": tag, "argsrepr": "", "kwargsrepr": ""},
            "properties": {
                "correlation_id": tag,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": ""},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": tag,
            },
        }
    )
