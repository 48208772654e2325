"""Loading models, drafters, calibration and memory."""

from __future__ import annotations
