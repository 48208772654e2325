"""Sampling parameters as arrays: one record a row of logits, and the noise keys of its draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.segments import IntArray

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB

# One row's parameters; `parameters_t` of native.c. `log_min_p` is -inf, and `top_k` 0, where they exclude nothing.
PARAMETERS = np.dtype(
    [
        ("key", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("log_min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("top_k", np.int32),
        ("adjusted", np.int32),
    ]
)
ParameterArray = NDArray[Any]  # of PARAMETERS


@dataclass(frozen=True, slots=True)
class Adjustments:
    """What changes the logits of some rows: biases, and the tokens that penalties apply to.

    The biases of row i begin at `bias_starts[i]` and end before `bias_starts[i + 1]`; its seen tokens likewise. The
    tokens of a row are distinct.
    """

    bias_starts: IntArray  # [rows + 1]
    bias_tokens: IntArray
    biases: NDArray[np.float32]
    seen_starts: IntArray  # [rows + 1]
    seen_tokens: IntArray  # of prompt and output
    seen_counts: IntArray  # in the output


def noise_keys(parameters: ParameterArray, positions: IntArray) -> NDArray[np.uint64]:
    """Return the noise key [rows] of each row: a hash of its sequence's key and the position of the token to draw."""
    return mix(parameters["key"] ^ mix(np.asarray(positions).astype(np.uint64)))


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014)."""
    z = z + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))
