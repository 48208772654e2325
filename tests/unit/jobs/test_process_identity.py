from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from jobs.process_identity import follows, identity, is_dead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which processes there are")


def test_a_killed_process_is_dead_even_before_its_parent_has_reaped_it() -> None:
    process = subprocess.Popen(["sleep", "60"])
    name = identity(process.pid)
    assert name is not None
    assert not is_dead(name)

    process.send_signal(signal.SIGSTOP)
    assert not is_dead(name)

    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is not reaped yet
    assert is_dead(name)
    process.wait()
    assert is_dead(name)


def test_a_process_that_reuses_an_id_is_not_the_first_one() -> None:
    name = identity()
    assert name is not None
    assert not is_dead(name)
    assert is_dead(name.rpartition("/")[0] + "/1")  # another start time


def test_the_same_id_in_another_namespace_of_this_boot_follows_the_first_process() -> None:
    assert follows("boot/pid:[2]/7/50", "boot/pid:[1]/7/20")
    for earlier in ("boot/pid:[2]/7/20", "boot/pid:[1]/8/20", "other/pid:[1]/7/20", None, ""):
        assert not follows("boot/pid:[2]/7/50", earlier)
    assert not follows(None, None)


@pytest.mark.parametrize("name", [None, "", "worker-1", "another-boot/pid:[1]/1/1"])
def test_a_process_that_cannot_be_seen_is_not_declared_dead(name: str | None) -> None:
    assert not is_dead(name)
