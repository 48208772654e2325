"""GPUs and CPUs of each replica, on machines simulated by a few files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import SetupError
from worker.node import placement
from worker.node.placement import parse_cpu_list, place_replicas, visible_gpus
from worker.node.supervisor import replica
from worker.settings import WorkerSettings


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four GPUs: two on each of two NUMA nodes of eight CPUs."""
    for number, cpus in enumerate(["0-7", "0-7", "8-15", "8-15"]):
        address = f"0000:{number + 1:X}B:00.0"
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        device = tmp_path / "sys/bus/pci/devices" / address.lower()
        device.mkdir(parents=True)
        (device / "local_cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(placement, "allowed_cpus", lambda: list(range(16)))
    return tmp_path


def test_every_replica_has_gpus_of_its_own_and_the_cpus_beside_them(node: Path) -> None:
    one_each = place_replicas(4, 1, {}, node)
    assert [placement.gpus for placement in one_each] == [("0",), ("1",), ("2",), ("3",)]
    assert [sorted(placement.cpus) for placement in one_each] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
        [12, 13, 14, 15],
    ]
    two_each = place_replicas(2, 2, {}, node)
    assert [placement.gpus for placement in two_each] == [("0", "1"), ("2", "3")]
    assert [sorted(placement.cpus) for placement in two_each] == [list(range(8)), list(range(8, 16))]


def test_zero_replicas_means_as_many_as_the_gpus_hold(node: Path) -> None:
    assert len(place_replicas(0, 1, {}, node)) == 4
    assert len(place_replicas(0, 2, {}, node)) == 2
    assert len(place_replicas(0, 1, {"CUDA_VISIBLE_DEVICES": "2,3"}, node)) == 2


def test_too_few_gpus_are_an_error_that_names_what_fits(node: Path) -> None:
    with pytest.raises(SetupError, match="start 2 replicas"):
        place_replicas(4, 2, {}, node)
    with pytest.raises(SetupError, match="at most 4"):
        place_replicas(1, 8, {}, node)


def test_only_visible_gpus_are_assigned(node: Path) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-5a, 3"}, node) == ["GPU-5a", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, node) == []
    assert [p.gpus for p in place_replicas(2, 1, {"CUDA_VISIBLE_DEVICES": "3,1"}, node)] == [("3",), ("1",)]


@pytest.mark.parametrize(("replicas", "cpus"), [(2, 7), (4, 4), (5, 2), (3, 16)])
def test_replicas_without_gpus_share_all_cpus_and_none_goes_without(
    replicas: int, cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "allowed_cpus", lambda: list(range(cpus)))
    shares = [placement.cpus for placement in place_replicas(replicas, 1, {}, tmp_path)]
    assert set().union(*shares) == set(range(cpus))
    assert all(shares)
    if replicas <= cpus:
        assert sum(map(len, shares)) == cpus


def test_a_replicas_environment_has_its_placement_and_the_settings(node: Path) -> None:
    settings = WorkerSettings(target="some/model", replicas=2, tp=2)
    variables = replica(settings, place_replicas(2, 2, {}, node)[1]).environment
    assert variables["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert (variables["BASIC_REPLICAS"], variables["BASIC_TP"], variables["BASIC_TARGET"]) == ("1", "2", "some/model")
    assert (variables["BASIC_THREADS"], variables["BASIC_MEMORY_SHARE"]) == ("4", "0.5")


def test_cpu_lists_are_read_as_the_kernel_writes_them() -> None:
    assert parse_cpu_list("0-2,7,9-10\n") == {0, 1, 2, 7, 9, 10}
    assert parse_cpu_list("\n") == set()
