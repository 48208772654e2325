"""Engine tests run on models so small that a second thread only gets in the way."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
