from __future__ import annotations

from pathlib import Path

import pytest

from worker.serving.energy import BusyPower, rapl_meter


def test_processor_energy_is_the_sum_of_the_packages_without_their_parts(tmp_path: Path) -> None:
    zones = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for name, microjoules in zip(zones, (5_000_000, 1_000_000, 9_000_000, 6_500_000), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{zones[name]}\n")
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
    meter = rapl_meter(tmp_path)
    assert meter is not None
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7500000\n")
    assert meter.joules() == pytest.approx(2.5)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000\n")
    assert meter.joules() == 0.0, "a counter that began at 0 again"


def test_without_counters_nothing_is_measured(tmp_path: Path) -> None:
    assert rapl_meter(tmp_path) is None


def test_power_is_that_of_busy_intervals_only() -> None:
    power = BusyPower(configured_w=40.0)
    power.take(joules=50.0, seconds=5.0, step_s=0.5)
    assert power.as_json() == {"configured_power_w": 40.0}
    power.take(joules=700.0, seconds=7.0, step_s=7.5)
    assert power.as_json() == {"measured_power_w": 100.0}


def test_a_power_that_is_neither_measured_nor_configured_is_not_shown() -> None:
    power = BusyPower()
    power.take(joules=0.0, seconds=60.0, step_s=60.0)
    assert power.as_json() == {}
