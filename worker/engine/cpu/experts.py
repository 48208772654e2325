"""The experts of a mixture for the CPU: each row's sum over its experts has an order of its own.

transformers chooses a product by the number of rows, so that a row's bits would depend on its batch. Here the rows of
an expert are multiplied by packed weights, whose products have the same bits for any number of rows, and a row adds its
experts in the order in which its router names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.cpu.stable_functions import StableFunctions
from worker.engine.cpu.stable_weight import packed_weight


class PackedExperts(nn.Module):
    """Experts with packed weights; the interface is that of transformers' experts."""

    def __init__(self, experts: Any, ups: list[PackedLinear], downs: list[PackedLinear], gated: bool) -> None:
        """Take the packed weights of `experts`; `gated` products return silu(gate) * up."""
        super().__init__()
        self.num_experts = len(ups)
        self._of_model = [experts]  # in a list: no module of this one, whose weights are gone
        self._ups, self._downs, self._gated = nn.ModuleList(ups), nn.ModuleList(downs), gated
        self._stable = StableFunctions()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum [n, width] over the experts `top_k_index` [n, k] of each row [n, width]."""
        n, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.clamp(max=self.num_experts).bincount(minlength=self.num_experts).tolist()[: self.num_experts]
        out = hidden_states.new_zeros(n * k, hidden_states.shape[-1])
        for number, pairs in enumerate(torch.split(order[: sum(counts)], counts)):
            if len(pairs):
                out[pairs] = self._run(number, hidden_states[pairs // k])
        weighted = out.view(n, k, -1) * top_k_weights.unsqueeze(-1)
        total = weighted[:, 0].float()
        for rank in range(1, k):
            total = total + weighted[:, rank].float()
        return total.to(hidden_states.dtype)

    def _run(self, number: int, rows: Tensor) -> Tensor:
        own = self._of_model[0]
        inner = self._ups[number](rows)
        if not self._gated:
            with self._stable:
                inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
        out: Tensor = self._downs[number](inner)
        return own.post_expert_norm(out) if own.has_post_expert_norm else out


def packed_experts(experts: Any) -> PackedExperts | None:
    """Return experts with packed weights, and free the weights of `experts`; None if they are of another kind."""
    if not all(hasattr(experts, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj")):
        return None
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    gated = (
        experts.has_gate
        and not experts.has_bias
        and experts.is_concatenated
        and type(experts)._apply_gate is _default_apply_gate
        and isinstance(experts.act_fn, SiLUActivation | nn.SiLU)
    )
    ups, downs = _packed(experts, first, gated), _packed(experts, "down_proj", gated=False)
    if ups is None or downs is None:
        return None
    for name in (first, "down_proj"):
        setattr(experts, name, None)
    return PackedExperts(experts, ups, downs, gated)


@torch.inference_mode()
def _packed(experts: Any, name: str, gated: bool) -> list[PackedLinear] | None:
    weights, biases = getattr(experts, name), getattr(experts, f"{name}_bias", None) if experts.has_bias else None
    found = []
    for number, weight in enumerate(weights):
        matrix = weight.t() if experts.is_transposed else weight
        packed = packed_weight(matrix.contiguous(), None if biases is None else biases[number], gated=gated)
        if packed is None:
            return None
        found.append(packed)
    return found
