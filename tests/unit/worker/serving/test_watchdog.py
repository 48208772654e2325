from __future__ import annotations

from worker.serving.watchdog import Watchdog


def test_a_process_restarts_when_its_engine_hangs_and_not_while_it_iterates() -> None:
    dog = Watchdog(stall_s=10, deaf_s=60)
    assert dog.restart_reason(0.0) is None
    for now in range(0, 100, 5):
        assert dog.record_iterations(now, float(now))
        assert dog.restart_reason(float(now)) is None
    assert not dog.record_iterations(95, 104.0)
    assert dog.restart_reason(104.0) is None
    assert dog.restart_reason(106.0) == "the engine has not finished a step for 11 s"


def test_a_process_restarts_when_redis_accepts_its_pulses_and_none_arrives() -> None:
    dog = Watchdog(stall_s=1e9, deaf_s=60)
    for now in range(0, 61, 5):
        dog.pulse_sent(delivered=True, now=float(now))
        assert dog.restart_reason(float(now)) is None
    assert dog.restart_reason(61.0) is not None

    dog.pulse_received()
    assert dog.restart_reason(61.0) is None


def test_missing_pulses_do_not_count_while_redis_is_away() -> None:
    dog = Watchdog(stall_s=1e9, deaf_s=60)
    dog.pulse_sent(delivered=True, now=0.0)
    dog.pulse_sent(delivered=False, now=50.0)
    assert dog.restart_reason(1000.0) is None
    dog.pulse_sent(delivered=True, now=1000.0)
    assert dog.restart_reason(1059.0) is None
    assert dog.restart_reason(1061.0) is not None


def test_a_request_process_hangs_when_it_is_silent_at_two_looks_and_may_take_longer_to_start() -> None:
    dog = Watchdog(stall_s=10, deaf_s=60)
    assert not dog.record_heard(0.0, 11.0), "the worker itself may have been frozen"
    assert dog.record_heard(0.0, 16.0)
    assert not dog.record_heard(17.0, 20.0)
    assert not dog.record_heard(17.0, 28.0)
    assert dog.restart_reason(1000.0) is None, "the worker itself goes on"

    starting = Watchdog(stall_s=10, deaf_s=60)
    assert not any(starting.record_heard(0.0, float(now), starting=True) for now in range(0, 300, 5))
    assert [starting.record_heard(0.0, now, starting=True) for now in (301.0, 306.0)] == [False, True]
