"""A whole model on the CPU in one call: embeddings, decoder layers, norm, logits."""

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
from worker.engine.cpu.kernels import (
    EXCHANGE,
    Forward,
    Kernels,
    Network,
    Product,
    Scratch,
    SplitSums,
    address,
)
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.segments import Segment, Segments
from worker.engine.shards.exchange import Exchange
from worker.engine.shards.shard import Shard

# Models that consist of embeddings, layers, norm and logits only: no scale, softcap or bias of the logits.
KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
_UNUSED = 2  # getrefcount() of an array that only its owner references: the owner's and the argument's


class CpuNetwork:
    """A decoder or draft head whose whole forward is one C call, with the buffers of that call."""

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
        """Point the C structure at the weights.

        `rotary` holds cosines and sines [positions, dim]. `hidden` stores the outputs of the tapped layers; its slots
        have the length of the KV slots. A draft head also has `unit` and `join`: `unit` normalises the embedding of a
        row's token and the hidden state before it, and `join` projects the two to one row.
        """
        cos, sin = (part.contiguous() for part in rotary)
        self._kept = (stack, norm, output, embedding, cos, sin, unit, join)  # the C structure points into them
        self._stack, self._kernels = stack, kernels
        assert (hidden is not None) == bool(stack.taps), "tapped layers need `hidden`, and only they"
        self._tapped = hidden.address if hidden is not None else None
        self._vocabulary, self._width = output.out_features, embedding.shape[1]
        self._like = embedding.new_empty(0)
        self._scratch = self._like
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
        exchange = stack.shard.exchange
        self._split = None if exchange is None else _Split(stack.shard, exchange, embedding)
        if self._split is not None:
            self._network.split = ctypes.addressof(self._split.structure)
        self._dim = int(cos.shape[1])
        linears = (output,) if join is None else (output, join)
        self._row_sizes = (*stack.scratch_sizes(*linears), self._width, self._dim, self._dim, 2 * self._width)

    def forward(
        self, segments: Sequence[Segment], plan: CpuAttentionPlan, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the rows of `segments`; those of a draft head with the hidden `states` [n, width] before them.

        Return float32 logits [kept, vocabulary] and normed last hidden states [kept, width]. Of a split model, ranks
        other than the first have logits of their share of the vocabulary. Raises RankLost if a rank is gone.
        """
        packed = Segments.of(segments)
        ids, positions, kept = packed.ids, packed.positions, packed.kept
        n, width = len(ids), self._width
        logits = self._logits_buffer(len(kept))
        last = self._like.new_empty(len(kept), width)
        structure, views = plan.structures(self._stack.windows, self._stack.scaling)
        *scratch, x, cos, sin, joined = self._scratch_addresses(n)
        self._network.layer_size = plan.kv.keys.stride(0)
        if self._split is not None:
            self._split.make_room(n)
        self._kernels.run_network(
            ctypes.byref(self._network),
            ctypes.byref(structure),
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
        return (logits if self._split is None else self._split.joined(logits)), last

    def prepare(self, logit_rows: int) -> None:
        """Allocate the logits buffer for this many rows now, so that no request waits for it."""
        self._logits_buffer(logit_rows).zero_()

    def _logits_buffer(self, rows: int) -> Tensor:
        """Return a buffer for the logits of `rows` rows: the last one, unless a caller still holds it.

        The operating system must zero the pages of a new buffer: for forty rows that takes as long as the forward of a
        small model.
        """
        if len(self._logits) < rows or getrefcount(self._logits) > _UNUSED:
            size = max(rows, len(self._logits))
            self._logits = np.empty((size, self._vocabulary), np.float32)  # numpy asks for huge pages
        return torch.from_numpy(self._logits[:rows])

    def _scratch_addresses(self, rows: int) -> list[int]:
        """Return the addresses of the scratch buffers for `rows` rows. The memory behind them only grows."""
        sizes = [rows * size for size in self._row_sizes]
        starts = list(accumulate(sizes, initial=0))
        if len(self._scratch) < starts[-1]:
            self._scratch = self._like.new_empty(starts[-1])
        first, step = self._scratch.data_ptr(), self._scratch.element_size()
        return [first + start * step for start in starts[:-1]]


class _Split:
    """What the C call needs to add up products with the other ranks."""

    def __init__(self, shard: Shard, exchange: Exchange, embedding: Tensor) -> None:
        self._exchange, self._vocabulary = exchange, len(embedding)
        self._row_size = shard.ranks * shard.sums * embedding.shape[1]
        self._sums = torch.empty(0)
        self._failure: Exception | None = None
        self.structure = SplitSums(
            rank=shard.rank, ranks=shard.ranks, each=shard.sums, exchange=EXCHANGE(self._all_gather)
        )

    def make_room(self, rows: int) -> None:
        """Allocate the sums of `rows` rows."""
        if len(self._sums) < rows * self._row_size:
            self._sums = torch.empty(rows * self._row_size)
            self.structure.sums = self._sums.data_ptr()

    def _all_gather(self, numbers: int) -> None:
        """Exchange `numbers` float32 of each rank; C calls it, so it raises nothing."""
        if self._failure is not None:  # the rest of the forward is lost
            return
        first, ranks = self._exchange.rank * numbers, self._exchange.ranks
        try:
            self._exchange.all_gather(self._sums[: ranks * numbers], self._sums[first : first + numbers])
        except Exception as failure:
            self._failure = failure

    def joined(self, logits: Tensor) -> Tensor:
        """Return the logits of all ranks on the first one, its own share on others."""
        if self._failure is not None:
            raise self._failure
        shares = self._exchange.gather(logits)
        return logits if shares is None else torch.cat(shares, 1)[:, : self._vocabulary]


def fused_model(
    model: nn.Module, capacity: int, kernels: Kernels, hidden: HiddenStates | None, exact: int | None = None
) -> CpuNetwork | None:
    """Return a model with fused layers as one network of `capacity` positions; None if parts of it are not fused.

    The outputs of tapped layers go to `hidden`. Sequences have at most `exact` positions; None: `capacity`.
    """
    body: Any = getattr(model, "model", None)
    if type(model).__name__ not in KNOWN or not isinstance(body.layers[0], FusedLayers):
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

    Positions from `exact` on repeat the last exact one: a larger position could change the frequencies of all.
    """
    positions = torch.arange(capacity, device=like.device).clamp(max=(exact or capacity) - 1).unsqueeze(0)
    cos, sin = body.rotary_emb(like, position_ids=positions)
    return cos[0], sin[0]
