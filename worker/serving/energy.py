"""How much energy the worker's GPU has drawn, as NVML counts it. Where nothing counts, there is no meter.

Asked every few seconds by the housekeeping thread; decoding knows nothing of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

_MILLI: Final = 1e-3


class EnergyMeter:
    """Joules since the last look, from a counter of millijoules that only grows."""

    def __init__(self, read_mj: Callable[[], int]) -> None:
        """Start counting now."""
        self._read_mj = read_mj
        self._last_mj = read_mj()

    def joules(self) -> float:
        """Return what was drawn since the last call."""
        now_mj = self._read_mj()
        drawn_mj, self._last_mj = now_mj - self._last_mj, now_mj
        return max(drawn_mj, 0) * _MILLI  # a driver that was loaded again counts from 0


def gpu_meter() -> EnergyMeter | None:
    """Return the meter of the GPU that torch computes on; None without a GPU, NVML, or a counter in it."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return EnergyMeter(lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
    except Exception as error:  # whatever is missing, jobs run without a meter
        log.info("No energy is measured: %s", error, extra={"action": "energy"})
        return None
