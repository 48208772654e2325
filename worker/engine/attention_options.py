"""How the attention of a layer turns scores into weights: scale, sliding window, softcap, sinks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Arguments of one layer's attention beside queries, keys and values."""

    scaling: float  # of the products of queries and keys
    window: int | None = None  # a row at position p sees positions above p - window
    # Gemma 2 (arXiv 2408.00118, section 2): scores become softcap * tanh(score / softcap).
    softcap: float | None = None
    # GPT-OSS (arXiv 2508.10925, section 2): [heads], a score of each head that joins the softmax without a value.
    sinks: Tensor | None = None
