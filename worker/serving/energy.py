"""Measure the energy of the worker's device: NVML's counter of a GPU, or the RAPL counters of the processors.

The housekeeping thread reads it every few seconds, outside the step loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

_MILLI: Final = 1e-3
_RAPL: Final = Path("/sys/class/powercap")
_BUSY_SHARE: Final = 0.9  # of the time in steps, from which on the worker counts as busy
_ENOUGH_S: Final = 5.0  # busy time that gives a mean power


class EnergyMeter:
    """Joules between two reads of a monotonic counter in millijoules."""

    def __init__(self, read_mj: Callable[[], int]) -> None:
        self._read_mj = read_mj
        self._last_mj = read_mj()

    def joules(self) -> float:
        """Return the joules since the last call."""
        now_mj = self._read_mj()
        drawn_mj, self._last_mj = now_mj - self._last_mj, now_mj
        return max(drawn_mj, 0) * _MILLI  # a counter that is full, or of a reloaded driver, begins at 0


class BusyPower:
    """Mean power while the worker is busy: what an estimate of energy is made from."""

    def __init__(self, configured_w: float = 0.0) -> None:
        """Take the power in watts that is assumed where nothing measures it; 0: none."""
        self._configured_w = configured_w
        self._joules = self._busy_s = self._step_s = 0.0

    def take(self, joules: float, seconds: float, step_s: float) -> None:
        """Add the energy of an interval, at whose end the steps had taken `step_s` in all."""
        in_steps, self._step_s = step_s - self._step_s, step_s
        if joules and in_steps >= _BUSY_SHARE * seconds:
            self._joules += joules
            self._busy_s += seconds

    def as_json(self) -> dict[str, Any]:
        """Return the power for the worker's load; empty if it is neither measured nor configured."""
        if self._busy_s >= _ENOUGH_S:
            return {"measured_power_w": round(self._joules / self._busy_s, 1)}
        return {"configured_power_w": self._configured_w} if self._configured_w else {}


def device_meter() -> EnergyMeter | None:
    """Return the meter of torch's current GPU, or of the processors without one; None if none can be read."""
    import torch

    return gpu_meter() if torch.cuda.is_available() else rapl_meter()


def gpu_meter() -> EnergyMeter | None:
    """Return the meter of torch's current GPU; None without NVML or an energy counter."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return EnergyMeter(lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
    except Exception as error:  # energy is optional: jobs run without it
        log.info("Energy is not measured: %s", error, extra={"action": "energy"})
        return None


def rapl_meter(folder: Path = _RAPL) -> EnergyMeter | None:
    """Return the meter of all processor packages of this machine; None if their counters can't be read.

    They count what every program of the machine draws, not only this worker. The zone `psys` of laptops holds the
    packages too, and is left out.
    """
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        counters = [zone / "energy_uj" for zone in zones if (zone / "name").read_text().startswith("package")]
        return EnergyMeter(lambda: sum(int(counter.read_text()) for counter in counters) // 1000) if counters else None
    except (OSError, ValueError) as error:
        log.info("Energy is not measured: %s", error, extra={"action": "energy"})
        return None
