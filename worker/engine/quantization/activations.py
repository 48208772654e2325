"""Rows in FP8 (e4m3): the input activations of layers with FP8 weights, where a scheme asks for it.

A row is rounded for every batch alike, and its scales depend on that row alone. So no batch, tree or chunk changes a
bit. A rule that rounds rows from some number of rows on could not promise that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

MAX = 448.0  # the largest number of e4m3
LEAST = 1e-10  # the least number that a scale represents: its inverse is finite
_TO_POWER, _EXPONENT = 0x7FFFFF, 0x7F800000  # to round the bits of a float32 up to a power of two


@dataclass(frozen=True, slots=True)
class ActivationScheme:
    """How rows are rounded before FP8 weights multiply them; the inputs that share a scale are those of the weights."""

    static_scale: float | None = None  # of all rows; None: dynamic, the largest number of a row becomes 448
    bound: float = inf  # larger numbers are clamped to it; dynamic scales only
    powers_of_two: bool = False  # dynamic scales are rounded up to powers of two


def rounded_rows(rows: Tensor, scheme: ActivationScheme, span: int) -> tuple[Tensor, Tensor]:
    """Round `rows` [n, inputs] to FP8; return float8 values [n, inputs] and scales [n, spans], float32.

    Each `span` inputs of a row share a scale. What is not finite makes its scale NaN.
    """
    n, inputs = rows.shape
    wide = torch.nn.functional.pad(rows.float(), (0, -inputs % span)).view(n, -1, span)
    top = wide.abs().amax(-1)
    if scheme.static_scale is None:
        scale = top.clamp(LEAST, scheme.bound) / MAX
    else:
        scale = torch.full_like(top, scheme.static_scale)
    if scheme.powers_of_two:
        scale = ((scale.view(torch.int32) + _TO_POWER) & _EXPONENT).view(torch.float32)
    numbers = wide * (1.0 / scale).unsqueeze(-1)
    values = numbers.nan_to_num(0.0).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
    return values.view(n, -1)[:, :inputs], torch.where(top.isfinite(), scale, torch.nan)
