"""Measure the energy of the worker's GPU from NVML's counter.

The housekeeping thread reads it every few seconds, outside the step loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

_MILLI: Final = 1e-3


class EnergyMeter:
    """Joules between two reads of a monotonic counter in millijoules."""

    def __init__(self, read_mj: Callable[[], int]) -> None:
        self._read_mj = read_mj
        self._last_mj = read_mj()

    def joules(self) -> float:
        """Return the joules since the last call."""
        now_mj = self._read_mj()
        drawn_mj, self._last_mj = now_mj - self._last_mj, now_mj
        return max(drawn_mj, 0) * _MILLI  # a reloaded driver counts from 0


def gpu_meter() -> EnergyMeter | None:
    """Return the meter of torch's current GPU; None without a GPU, NVML or an energy counter."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return EnergyMeter(lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
    except Exception as error:  # energy is optional: jobs run without it
        log.info("Energy is not measured: %s", error, extra={"action": "energy"})
        return None
