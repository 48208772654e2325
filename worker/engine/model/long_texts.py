"""Longrope by text: one that may grow beyond the original positions has the long factors from its first token.

transformers takes the long factors for all rows of a forward in which one position is beyond the original ones. That
would let a text change another's bits, and a text's own keys would turn in its middle: those before have other angles.
Here a row says by its position which factors it has, so a forward has rows of both kinds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.engine.model.architecture import choose_factors_by_text, long_text_tokens

LONG_OFFSET = 1 << 30  # what the position of a row with the long factors is increased by


class _RotaryByText:
    """The forward of a rotary embedding, run once for the rows of each kind."""

    def __init__(self, own: Any, original: int) -> None:
        """Take a module's forward; it takes the long factors if a position is `original` or more."""
        self._own, self._original = own, original

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **given: Any) -> Any:
        """Return what the forward returns for `position_ids` [1, n], some of which have LONG_OFFSET."""
        is_long = position_ids >= LONG_OFFSET
        short = self._own(x, position_ids.masked_fill(is_long, 0), *args, **given)
        if position_ids.device.type == "cpu" and not is_long.any():  # a GPU's graph runs both
            return short
        # One more position, beyond the original ones, selects the long factors.
        positions = nn.functional.pad((position_ids - LONG_OFFSET).clamp(min=0), (0, 1), value=self._original)
        long = self._own(x, positions, *args, **given)
        chosen = is_long.unsqueeze(-1)
        return tuple(torch.where(chosen, b[:, :-1], a) for a, b in zip(short, long, strict=True))


def use_factors_by_text(model: PreTrainedModel) -> None:
    """Let the rows of a loaded model choose the factors of its longrope; do nothing for a model without."""
    config = model.config.get_text_config()
    if not choose_factors_by_text(config):
        return
    original = long_text_tokens(config)
    for module in list(model.modules()):
        if "longrope" in _kinds(module) and callable(getattr(module, "forward", None)):
            module.forward = _RotaryByText(module.forward, original)  # type: ignore[arg-type]


def _kinds(module: Any) -> tuple[Any, ...]:
    found = getattr(module, "rope_type", None)
    return tuple(found.values()) if isinstance(found, dict) else (found,)
