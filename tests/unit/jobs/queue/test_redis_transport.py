"""Which errors mean that a Redis server refuses writes, and the pause that follows."""

from __future__ import annotations

import pytest
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from jobs.queue.redis_transport import Pause, refuses_to_write


@pytest.mark.parametrize(
    "error",
    [
        ReadOnlyError("You can't write against a read only replica."),
        OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
        ResponseError("Command # 1 (ZADD x) of pipeline caused error: MISCONF Errors writing to the AOF file"),
        ResponseError("NOREPLICAS Not enough good replicas to write."),
        ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)"),
    ],
)
def test_a_server_that_cannot_write_now_refuses(error: Exception) -> None:
    assert refuses_to_write(error)


@pytest.mark.parametrize("error", [ResponseError("WRONGTYPE Operation against a key"), OSError("MISCONF"), KeyError()])
def test_another_error_is_no_refusal(error: Exception) -> None:
    assert not refuses_to_write(error)


def test_pauses_grow_and_are_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    monkeypatch.setattr("jobs.queue.redis_transport.time.monotonic", lambda: now)
    caplog.set_level("INFO")
    pause, lengths = Pause(), []
    for _ in range(8):
        pause.refused(ReadOnlyError("no"))
        began_at = now
        while not pause.over:
            now += 0.25
        lengths.append(now - began_at)
    assert lengths == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["The Redis server refuses writes"]

    states = [pause.on]
    pause.end()
    assert [*states, pause.on] == [True, False]
    assert caplog.records[-1].getMessage() == "The Redis server accepts writes again"
    pause.refused(ReadOnlyError("no"))
    assert caplog.text.count("refuses writes") == 2
