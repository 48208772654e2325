from __future__ import annotations

from worker.serving.watchdog import Watchdog


def test_an_engine_that_turns_is_left_alone_and_one_that_hangs_is_not() -> None:
    dog = Watchdog(stall_s=10, deaf_s=60)
    assert dog.verdict(0.0) is None
    for now in range(0, 100, 5):
        assert dog.saw_turns(now, float(now))
        assert dog.verdict(float(now)) is None
    assert not dog.saw_turns(95, 104.0)
    assert dog.verdict(104.0) is None
    assert dog.verdict(106.0) == "the engine has not finished a step for 11 s"


def test_a_worker_is_deaf_when_redis_takes_its_messages_and_none_comes() -> None:
    dog = Watchdog(stall_s=1e9, deaf_s=60)
    for now in range(0, 61, 5):
        dog.sent(delivered=True, now=float(now))
        assert dog.verdict(float(now)) is None
    assert dog.verdict(61.0) is not None

    dog.heard()
    assert dog.verdict(61.0) is None


def test_while_redis_is_away_nobody_is_deaf() -> None:
    dog = Watchdog(stall_s=1e9, deaf_s=60)
    dog.sent(delivered=True, now=0.0)
    dog.sent(delivered=False, now=50.0)
    assert dog.verdict(1000.0) is None
    dog.sent(delivered=True, now=1000.0)
    assert dog.verdict(1059.0) is None
    assert dog.verdict(1061.0) is not None
