from __future__ import annotations

from worker.serving.watchdog import Watchdog


def test_an_engine_that_turns_is_left_alone_and_one_that_hangs_is_not() -> None:
    dog = Watchdog(stall_s=10, deaf_s=60)
    assert dog.restart_reason(0.0) is None
    for now in range(0, 100, 5):
        assert dog.record_iterations(now, float(now))
        assert dog.restart_reason(float(now)) is None
    assert not dog.record_iterations(95, 104.0)
    assert dog.restart_reason(104.0) is None
    assert dog.restart_reason(106.0) == "the engine has not finished a step for 11 s"


def test_a_worker_is_deaf_when_redis_takes_its_messages_and_none_comes() -> None:
    dog = Watchdog(stall_s=1e9, deaf_s=60)
    for now in range(0, 61, 5):
        dog.pulse_sent(delivered=True, now=float(now))
        assert dog.restart_reason(float(now)) is None
    assert dog.restart_reason(61.0) is not None

    dog.pulse_received()
    assert dog.restart_reason(61.0) is None


def test_while_redis_is_away_nobody_is_deaf() -> None:
    dog = Watchdog(stall_s=1e9, deaf_s=60)
    dog.pulse_sent(delivered=True, now=0.0)
    dog.pulse_sent(delivered=False, now=50.0)
    assert dog.restart_reason(1000.0) is None
    dog.pulse_sent(delivered=True, now=1000.0)
    assert dog.restart_reason(1059.0) is None
    assert dog.restart_reason(1061.0) is not None
