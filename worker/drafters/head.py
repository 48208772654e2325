"""Head drafter: a small network on the target's hidden states (EAGLE-3, arXiv 2503.01840), with its own KV slots.

For committed tokens it reads the target's hidden states; below the root, where the target has not run, its own outputs.
So every accepted token is read again in the next step, with the target's states.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, Protocol, Required, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from worker.drafters.candidates import best_children
from worker.drafters.eagle3_network import Eagle3Network
from worker.drafters.head_network import HeadNetwork
from worker.drafters.kv_tracker import DraftSlots, by_slot
from worker.engine.cpu.fused_layers import FusedNorm, LayerStack, fuse
from worker.engine.cpu.fused_model import CpuNetwork, rotary_table
from worker.engine.cpu.kernels import Kernels
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.cpu.packing import pack
from worker.engine.gpu.fused_layers import GpuLayers, fuse_on_gpu
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.attention import ATTENTION_NAME, AttentionPlan
from worker.engine.model.backend import make_backend
from worker.engine.options import MAX_STEP_NODES
from worker.engine.paged.attention import PagedAttentionPlan, gpu_kernels_for
from worker.engine.paged.rows import PagedRows
from worker.engine.paged.shape_buckets import BUCKETS
from worker.engine.quantization.weights import QuantizationMethod, quantize
from worker.engine.segments import IntArray, Segment, Segments
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest


class HeadModel(Protocol):
    """What `HeadDrafter` needs of a head."""

    tokens: Tensor  # [n] ids that it can propose, ascending
    vocabulary: int  # size of the target's vocabulary
    first_token: int  # of each text that has a row: 0 or 1

    def states(self, hidden: Tensor) -> Tensor:
        """Return states [n, width] from the target's hidden states [n, size]."""

    def forward(self, segments: Seq[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        """Run rows with the states [rows, width] before them; return logits [kept, n] and states [kept, width]."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` tokens of one slot to another."""


class Learner(Protocol):
    """Trains a head on the texts of its target while both decode."""

    def refresh(self) -> None:
        """Let the head draft with the latest weights. Called once a step, before its forwards."""

    def take(self, ids: list[int], num_prompt: int, states: Tensor) -> None:
        """Learn from a finished text; `states` [n - 1, size] are the target's after each token but the last."""


class PackOptions(TypedDict, total=False):
    """The keyword parameters of `PackedHead`."""

    slots: Required[int]
    capacity: Required[int]  # tokens of a slot
    cpu_kernels: bool
    paged: bool | None
    quantization: QuantizationMethod | None


class PackedHead:
    """A head's network with one KV slot per sequence."""

    def __init__(
        self,
        network: HeadNetwork | Eagle3Network,
        embedding: Tensor,
        output: Tensor,
        tokens: Tensor,
        *,
        slots: int,
        capacity: int,
        cpu_kernels: bool = True,
        paged: bool | None = None,
        quantization: QuantizationMethod | None = None,
    ) -> None:
        """Wrap a network, which is changed in place, with an `embedding` [vocabulary, width] of all target ids.

        `output` are the output weights [n, width] of `tokens`. Both are the target's, unless the head has its own.

        `cpu_kernels` and `paged` are as in `PackedModel`. With `quantization`, round the weights of a head that
        `basic draft train` made; a published head keeps them.
        """
        self.tokens, self.vocabulary, self.first_token = tokens, len(embedding), network.first_token
        self._embedding = embedding
        self._network = network.to(embedding.device, embedding.dtype).eval()
        network.model.set_attn_implementation(ATTENTION_NAME)
        network.lm_head = fixed_linear(output)
        ours = isinstance(network, HeadNetwork)
        if quantization is not None and ours:
            quantize(network, quantization)
        self._backend = make_backend(network.model, slots, capacity, cpu_kernels=cpu_kernels and ours, paged=paged)
        self._rotary = rotary_table(network.model, embedding, self._backend.kv.capacity)
        on_gpu = gpu_kernels_for(embedding.device)
        if on_gpu is not None and ours:
            fuse_on_gpu(network, on_gpu)
        compiled = self._backend.kernels
        self._compiled_network = self._fused_network(compiled) if compiled else None
        self._buckets = self._backend.bucketed(self._run_paged)
        if self._buckets is not None:
            # Of captured graphs. Padding rows read it too, so it is written from the start.
            self._input_states = embedding.new_zeros(BUCKETS[-1], network.shape.width)

    def _fused_network(self, compiled: Kernels) -> CpuNetwork:
        """Replace layers with fused implementations for this processor; return them as one network."""
        net: Any = self._network
        fuse(net, compiled)
        pack(net)
        net.unit = FusedNorm(net.unit, compiled)
        return CpuNetwork(
            net.model.layers[0],
            net.model.norm,
            net.lm_head,
            self._embedding,
            self._rotary,
            compiled,
            unit=net.unit,
            join=net.join,
        )

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture graphs of the forwards (GPU), or allocate their scratch memory (CPU)."""
        if self._buckets is not None:
            self._buckets.prepare()
        if self._compiled_network is not None:
            self._compiled_network.prepare(MAX_STEP_NODES)

    @torch.inference_mode()
    def states(self, hidden: Tensor) -> Tensor:
        """Return states [n, width] from the target's hidden states [n, size]."""
        return self._network.states(hidden)

    @torch.inference_mode()
    def forward(self, segments: Seq[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        """Run the rows of `segments`, in slot order, with the states [rows, width] before them."""
        packed = Segments.of(segments)
        if self._compiled_network is not None:
            return self._compiled_network.forward(packed, self._backend.plan(packed), states)  # type: ignore[arg-type]
        shape = self._buckets.shape_for(packed) if self._buckets else None
        if shape is not None:
            assert self._buckets is not None
            self._input_states[: len(states)] = states
            logits, out = self._buckets.forward(packed, shape)
            assert out is not None
            return logits, out[: len(logits)]
        device = self._embedding.device
        ids, positions, kept = (
            torch.from_numpy(part).to(device) for part in (packed.ids, packed.positions, packed.kept)
        )
        return self._run(ids, positions, kept, states, self._backend.plan(packed))

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` tokens of one slot to another."""
        self._backend.kv.copy_prefix(source, target, length)

    @torch.inference_mode()
    def embedded(self, ids: Seq[int]) -> Tensor:
        """Return the embeddings [n, width] of tokens."""
        return self._embedding[torch.tensor(ids, device=self._embedding.device)]

    @torch.inference_mode()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite the weights with those of a `HeadNetwork` of the same shape; call it between two forwards.

        KV entries stay: they are those of the weights before, which may cost acceptance until their texts end.
        """
        ours, like = self._network, self._embedding
        assert isinstance(ours, HeadNetwork), "published heads can't be replaced"
        with torch.device("meta"):
            theirs = HeadNetwork(ours.shape)
        placed = {name: weight.to(like.device, like.dtype) for name, weight in weights.items()}
        theirs.load_state_dict(placed, assign=True)
        theirs.requires_grad_(False)
        for name in ("fuse", "join"):
            _overwrite(getattr(ours, name), getattr(theirs, name))
        first = ours.model.layers[0]
        if isinstance(first, LayerStack):
            first.load(theirs.model.layers)
        else:
            ours.model.layers.load_state_dict(theirs.model.layers.state_dict())
        if isinstance(first, GpuLayers):
            first.load_last(theirs.model.norm)
        else:
            _overwrite(ours.model.norm, theirs.model.norm)

    def _run_paged(self, rows: PagedRows, plan: PagedAttentionPlan) -> tuple[Tensor, Tensor]:
        return self._run(rows.ids, rows.positions, rows.kept, self._input_states[: len(rows.ids)], plan)

    def _run(
        self, ids: Tensor, positions: Tensor, kept: Tensor, states: Tensor, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        x = self._network.entries(self._embedding[ids], states).unsqueeze(0)
        rotary = tuple(part[positions].unsqueeze(0) for part in self._rotary)
        for layer in self._network.model.layers:
            x = layer(x, position_embeddings=rotary, attention_mask=None, plan=plan)
        normed, states = self._network.outputs(x[0][kept])
        return self._network.lm_head(normed), states  # type: ignore[operator]


class HeadDrafter:
    """A `Drafter` that runs a head over each layer of the trees."""

    def __init__(self, head: HeadModel, hidden: HiddenStates, name: str, learner: Learner | None = None) -> None:
        """Use a head with the slot numbers of the target, whose hidden states are in `hidden`.

        A `learner` trains the head on the texts that finish.
        """
        self.name = name
        self.learner = learner
        self.forward_free = None  # every draft takes a forward
        self._head = head
        self._hidden = hidden
        self._slots = DraftSlots(head.first_token)
        self._parents = np.empty(0, np.int64)  # nodes of the layer that was run last
        self._states = torch.empty(0)  # [parents, width] their output states

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the head over the frontier and offer its best children."""
        by_tree = by_slot(forest, frontier)
        order = np.concatenate(by_tree)
        nodes = frontier[order]
        if forest.depth[frontier[0]]:
            segments = [
                self._slots.tree_rows(forest, _sequence(forest, frontier[some]), frontier[some]) for some in by_tree
            ]
            states = self._states[torch.from_numpy(indices_of(forest.parent[nodes], self._parents))]
        else:
            if self.learner is not None:
                self.learner.refresh()
            roots = [_sequence(forest, frontier[some]) for some in by_tree]
            segments = self._slots.catch_up(roots, self._feed, self._head.copy_prefix)
            states = self._before(segments)
        logits, self._states = self._head.forward(segments, states)
        self._parents = nodes
        ids, scores = best_children(forest, nodes, logits, self._head.tokens, self._head.vocabulary)
        tokens, probabilities = np.empty_like(ids), np.empty_like(scores)
        tokens[order], probabilities[order] = ids, scores
        return Candidates(tokens, probabilities)

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the tokens to read before the first layer can be drafted."""
        return self._slots.num_uncached_tokens(sequence)

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Drop the tree. Accepted tokens are read again with the target's states."""
        self._slots.of(forest.sequences[tree]).nodes.clear()

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence; learn from it if it is finished."""
        if self.learner is not None and sequence.finished and sequence.cached:
            ids = sequence.ids[: sequence.cached + 1]
            self.learner.take(ids, sequence.num_prompt, self._hidden.read(sequence.slot, 0, len(ids) - 1))
        self._slots.drop(sequence)

    def _feed(self, segment: Segment) -> None:
        self._head.forward([segment], self._before([segment]))

    def _before(self, segments: Seq[Segment]) -> Tensor:
        """Return the target's states at the positions before the tokens of chains; zeros before the first token."""
        parts = []
        for s in segments:
            first, end = int(s.positions[0]), int(s.positions[-1]) + 1
            tapped = self._hidden.read(s.slot, max(first - 1, 0), end - 1)
            if not first:
                parts.append(tapped.new_zeros(1, tapped.shape[1]))
            parts.append(tapped)
        return self._head.states(parts[0] if len(parts) == 1 else torch.cat(parts))


def _sequence(forest: Forest, nodes: IntArray) -> Sequence:
    """Return the sequence that nodes of one tree belong to."""
    return forest.sequences[int(forest.tree[nodes[0]])]


def indices_of(nodes: IntArray, among: IntArray) -> IntArray:
    """Return the index in `among` of each of `nodes`."""
    order = np.argsort(among)
    indices: IntArray = order[np.searchsorted(among, nodes, sorter=order)]
    return indices


def _overwrite(module: nn.Module, other: nn.Module) -> None:
    if isinstance(module, FusedNorm | PackedLinear):
        module.load(other)  # type: ignore[arg-type]  # a linear layer for a linear layer, a norm for a norm
    else:
        module.load_state_dict(other.state_dict())


def fixed_linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer with a weight [out, in] that is not trained, and no bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
