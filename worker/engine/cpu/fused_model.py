"""A whole network on the CPU in one call: embeddings, decoder layers, norm, logits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from sys import getrefcount
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.cpu.fused_layers import FusedLayers, FusedNorm
from worker.engine.cpu.kernels import Forward, Kernels, Network, Product, Scratch, address
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.segments import Segment, concatenated, kept_row_indices

# Models that are nothing but "embeddings, layers, norm, logits": no scale, no cap, no bias of the logits.
_KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_UNHELD = 2  # references to an array that nobody else holds: its owner's, and that of who counts


class CpuNetwork:
    """A network, and the room that its forwards work in."""

    def __init__(
        self,
        stack: FusedLayers,
        norm: FusedNorm,
        output: PackedLinear,
        embedding: Tensor,
        rotary: tuple[Tensor, Tensor],
        kernels: Kernels,
        *,
        hidden: HiddenStates | None = None,
        unit: FusedNorm | None = None,
        join: PackedLinear | None = None,
    ) -> None:
        """Take fused layers, what stands around them, and `rotary` cosines and sines [positions, dim].

        What is tapped goes to `hidden`, whose slots are as long as the KV slots. `unit` and `join` make a head of it: a
        row then joins its token and the state before it.
        """
        cos, sin = (part.contiguous() for part in rotary)
        self._kept = (stack, norm, output, embedding, cos, sin, unit, join)  # what the structure points into
        self._stack, self._kernels = stack, kernels
        assert (hidden is not None) == bool(stack.taps), "what is tapped needs a place"
        self._tapped = hidden.address if hidden is not None else None
        self._vocabulary, self._width = output.out_features, embedding.shape[1]
        self._like = embedding.new_empty(0)
        self._room = self._like
        self._logits = np.empty((0, self._vocabulary), np.float32)
        self._network = Network(
            embedding=embedding.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            layers=ctypes.addressof(stack.layers),
            count=len(stack.layers),
            width=self._width,
            taps=stack.taps,
            eps=stack.eps,
            norm=norm.weight.data_ptr(),
            output=output.product,
            unit=unit.weight.data_ptr() if unit else None,
            join=join.product if join else Product(),
        )
        self._dim = int(cos.shape[1])

    def forward(
        self, segments: Sequence[Segment], plan: CpuAttentionPlan, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the rows of `segments`, a head's with the `states` [n, width] before them.

        Return float32 logits [kept, vocabulary] and normed last states [kept, width].
        """
        ids, positions = concatenated([s.ids for s in segments]), concatenated([s.positions for s in segments])
        kept = kept_row_indices(segments)
        n, width = len(ids), self._width
        logits = self._room_for_logits(len(kept))
        last = self._like.new_empty(len(kept), width)
        numbers, views = plan.structures(self._stack.windows, self._stack.scaling)
        *scratch, x, cos, sin, joined = self._places(n)
        self._network.layer_size = plan.kv.keys.stride(0)
        self._kernels.run_network(
            ctypes.byref(self._network),
            ctypes.byref(numbers),
            views,
            ctypes.byref(Scratch(*scratch)),
            ctypes.byref(
                Forward(
                    ids=address(ids),
                    positions=address(positions),
                    kept=address(kept),
                    count=len(kept),
                    states=None if states is None else states.data_ptr(),
                    x=x,
                    cos=cos,
                    sin=sin,
                    joined=joined,
                    last=last.data_ptr(),
                    tapped=self._tapped,
                    logits=logits.data_ptr(),
                )
            ),
            plan.kv.keys.data_ptr(),
            plan.kv.values.data_ptr(),
        )
        return logits, last

    def prepare(self, logit_rows: int) -> None:
        """Make room for the logits of so many rows now, so that no request waits for it."""
        self._room_for_logits(logit_rows).zero_()

    def _room_for_logits(self, rows: int) -> Tensor:
        """Return room for the logits of so many rows: the same as last time, unless somebody still holds those.

        Megabytes that come from the operating system anew every time come in small pages that it must zero: for forty
        rows that takes as long as a small forward.
        """
        if len(self._logits) < rows or getrefcount(self._logits) > _UNHELD:
            most = max(rows, len(self._logits))
            self._logits = np.empty((most, self._vocabulary), np.float32)  # numpy asks for huge pages
        return torch.from_numpy(self._logits[:rows])

    def _places(self, rows: int) -> list[int]:
        """Return the addresses of the room for so many rows, which only grows."""
        sizes = [rows * size for size in (*self._stack.room, self._width, self._dim, self._dim, 2 * self._width)]
        starts = list(accumulate(sizes, initial=0))
        if len(self._room) < starts[-1]:
            self._room = self._like.new_empty(starts[-1])
        first, step = self._room.data_ptr(), self._room.element_size()
        return [first + start * step for start in starts[:-1]]


def fused_model(
    model: nn.Module, capacity: int, kernels: Kernels, hidden: HiddenStates | None, exact: int | None = None
) -> CpuNetwork | None:
    """Return a quickened model as one network with `capacity` positions; None if it is more than that.

    What is tapped goes to `hidden`. No text has more than `exact` positions; None: as many as there is room for.
    """
    body: Any = getattr(model, "model", None)
    if type(model).__name__ not in _KNOWN or not isinstance(body.layers[0], FusedLayers):
        return None
    output: Any = model.lm_head
    if not isinstance(output, PackedLinear) or not output.floats:
        return None
    embedding = body.embed_tokens.weight.detach()
    rotary = rotary_table(body, embedding, capacity, exact)
    return CpuNetwork(body.layers[0], body.norm, output, embedding, rotary, kernels, hidden=hidden)


@torch.inference_mode()
def rotary_table(body: Any, like: Tensor, capacity: int, exact: int | None = None) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [capacity, dim] as a transformers model computes them.

    Positions from `exact` on get those of the last before: a larger one could change the frequencies of all.
    """
    positions = torch.arange(capacity, device=like.device).clamp(max=(exact or capacity) - 1).unsqueeze(0)
    cos, sin = body.rotary_emb(like, position_ids=positions)
    return cos[0], sin[0]
