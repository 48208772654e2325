"""Keys and values in FP8 (e4m3): a byte a number, and an exponent for each row and KV head.

The exponent is that of the largest number of the row in this head, so a row's bytes depend on that row alone. Scales
are powers of two: what is decoded is exact in bfloat16, and every attention path reads the same numbers. A row that is
not finite is decoded to NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

POISON = 254  # a byte that spoils what reads it, as a number or as an exponent
_LEAST, _SPOILT = 32, 254  # biased float32 exponents; the scale of _SPOILT is infinite, and 0 times infinity is NaN
_ATTRIBUTE = "basic_fp8_kv"  # attribute of a loaded model


def store_kv_in_fp8(model: PreTrainedModel) -> None:
    """Make the KV slots of a loaded model hold FP8, in every layout."""
    setattr(model, _ATTRIBUTE, True)


def has_fp8_kv(model: PreTrainedModel) -> bool:
    """Return whether the KV slots of a model hold FP8."""
    return bool(getattr(model, _ATTRIBUTE, False))


def kv_dtype_of(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype of the stored keys and values of a model."""
    return torch.float8_e4m3fn if has_fp8_kv(model) else model.dtype


def encoded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round `rows` [..., dim] to FP8; return uint8 numbers [..., dim] and exponents [...].

    The largest number becomes 128 to 256, so none is out of range; ties go to even.
    """
    wide = rows.float()
    exponents = (wide.abs().amax(-1).view(torch.int32) >> 23).clamp(_LEAST, _SPOILT)
    inverse = ((261 - exponents) << 23).view(torch.float32)
    numbers = (wide * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8)
    numbers = numbers.masked_fill((exponents == _SPOILT).unsqueeze(-1), 0)
    return numbers, exponents.to(torch.uint8)


def decoded(numbers: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows [..., dim] of uint8 `numbers` [..., dim] and `exponents` [...] in `dtype`, exactly."""
    scale = ((exponents.int() + 1) << 23).view(torch.float32)  # of numbers that are decoded to 2^-8 of their value
    return (numbers.view(torch.float8_e4m3fn).float() * 2.0**-8 * scale.unsqueeze(-1)).to(dtype)
