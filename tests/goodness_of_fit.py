"""Probabilities of a sample under a law, for tests of draws: small ones refute the law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def chi_square_p(counts: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """Return the p-value of Pearson's chi-squared test for counts [n] of n outcomes, expected [n]."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = torch.tensor((counts.size - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def kolmogorov_p(probabilities: NDArray[np.float64]) -> float:
    """Return the p-value of the Kolmogorov-Smirnov test for a sample's values of the law's distribution function [n].

    The asymptotic series with Stephens' correction (1970) for the sample's size.
    """
    ordered, n = np.sort(probabilities), probabilities.size
    distance = max(float((np.arange(1, n + 1) / n - ordered).max()), float((ordered - np.arange(n) / n).max()))
    scaled = distance * (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n))
    return 2.0 * sum(math.copysign(math.exp(-2.0 * (k * scaled) ** 2), k % 2 - 0.5) for k in range(1, 101))
