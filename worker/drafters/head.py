"""Head drafter: a small network that reads the target's hidden states, with KV slots of its own.

For committed tokens it reads what the target thought there; below the root, where the target has not been, its own
outputs. So every accepted token is read once more, with the target's states, in the next step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from worker.drafters.head_network import HeadNetwork
from worker.drafters.lanes import Lanes, by_slot
from worker.drafters.ranking import best_children
from worker.engine.attention import ATTENTION_NAME
from worker.engine.draft_tree import Candidates, Forest
from worker.engine.hidden_states import HiddenStates
from worker.engine.language_model import KvStore, kv_store
from worker.engine.layers import FusedNorm, fuse
from worker.engine.linear import pack
from worker.engine.rows import IntArray, Segment, kept_rows
from worker.engine.sequence import Sequence


class HeadModel(Protocol):
    """What the drafter needs of a head."""

    tokens: Tensor  # [n] ids that it can propose, ascending
    vocabulary: int  # of the target

    def states(self, hidden: Tensor) -> Tensor:
        """Return states [n, width] from the target's hidden states [n, size]."""

    def forward(self, segments: Seq[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        """Run rows with the states [n, width] before them; return logits [kept, n] and states [kept, width]."""


class PackedHead:
    """A head's network with a KV slot per sequence."""

    def __init__(
        self,
        network: HeadNetwork,
        embedding: Tensor,
        output: Tensor,
        tokens: Tensor,
        *,
        slots: int,
        capacity: int,
        native: bool = True,
    ) -> None:
        """Take a network for good, the target's `embedding` [vocabulary, width], and its `output` rows for `tokens`."""
        self.tokens, self.vocabulary = tokens, len(embedding)
        self._embedding = embedding
        self._network = network.to(embedding.device, embedding.dtype).eval()
        network.model.set_attn_implementation(ATTENTION_NAME)
        network.lm_head = _linear(output)
        self._store: KvStore = kv_store(network.model, slots, capacity, native)
        positions = torch.arange(self._store.kv.capacity, device=embedding.device).unsqueeze(0)
        with torch.inference_mode():
            self._rotary = [part[0] for part in network.model.rotary_emb(embedding, position_ids=positions)]
        if self._store.compiled is not None:
            fuse(network, self._store.compiled)
            pack(network, self._store.compiled)
            network.unit = FusedNorm(network.unit, self._store.compiled)  # type: ignore[assignment]

    @torch.inference_mode()
    def states(self, hidden: Tensor) -> Tensor:
        """Return states [n, width] from the target's hidden states [n, size]."""
        return self._network.states(hidden)

    @torch.inference_mode()
    def forward(self, segments: Seq[Segment], states: Tensor) -> tuple[Tensor, Tensor]:
        """Run the rows of `segments`, which are in slot order, with the states [n, width] before them."""
        device = self._embedding.device
        ids, positions = (
            torch.from_numpy(np.concatenate(part)).to(device)
            for part in ([s.ids for s in segments], [s.positions for s in segments])
        )
        x = self._network.entries(self._embedding[ids], states).unsqueeze(0)
        rotary = tuple(part[positions].unsqueeze(0) for part in self._rotary)
        plan = self._store.plan(segments)
        for layer in self._network.model.layers:
            x = layer(x, position_embeddings=rotary, attention_mask=None, plan=plan)
        out = self._network.model.norm(x[0][kept_rows(segments).to(device)])
        return self._network.lm_head(out), out  # type: ignore[operator]


class HeadDrafter:
    """Drafts with a head."""

    def __init__(self, head: HeadModel, hidden: HiddenStates, name: str) -> None:
        """Use a head for slots numbered as the target's, whose hidden states lie in `hidden`."""
        self.name = name
        self.free = None  # it is a network and nothing else
        self._head = head
        self._hidden = hidden
        self._lanes = Lanes()
        self._states: dict[int, Tensor] = {}  # [width] by node of the forest that is growing

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the head over the frontier and offer its best children."""
        places = by_slot(forest, frontier)
        order = np.concatenate(places)
        if not forest.depth[frontier[0]]:
            self._states.clear()
        rows = [self._rows(forest, frontier[some]) for some in places]
        logits, states = self._head.forward([segment for segment, _ in rows], torch.cat([before for _, before in rows]))
        self._states.update(zip(frontier[order].tolist(), states, strict=True))
        ids, scores = best_children(forest, frontier[order], logits, self._head.tokens, self._head.vocabulary)
        tokens, probabilities = np.empty_like(ids), np.empty_like(scores)
        tokens[order], probabilities[order] = ids, scores
        return Candidates(tokens, probabilities)

    def behind(self, sequence: Sequence) -> int:
        """Return the tokens that are to be read before the first layer can be drafted."""
        return self._lanes.behind(sequence)

    def keep(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Forget the tree: what was accepted of it is read again, with the target's states."""
        self._lanes.of(forest.sequences[tree]).nodes.clear()

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._lanes.drop(sequence)

    def _rows(self, forest: Forest, nodes: IntArray) -> tuple[Segment, Tensor]:
        """Return the rows of one tree's nodes, and the states before them."""
        sequence = forest.sequences[forest.tree[nodes[0]]]
        if forest.depth[nodes[0]]:
            segment = self._lanes.below(forest, sequence, nodes)
            return segment, torch.stack([self._states[int(node)] for node in forest.parent[nodes]])
        for late in self._lanes.late(sequence):
            self._head.forward([late], self._before(late))
        segment = self._lanes.rest(sequence)
        return segment, self._before(segment)

    def _before(self, segment: Segment) -> Tensor:
        """Return the target's states before the tokens of a chain; there is none before the first of a text."""
        states = self._head.states(self._hidden.read(segment.slot, max(segment.start - 1, 0), segment.end - 1))
        return states if segment.start else torch.cat([states.new_zeros(1, states.shape[1]), states])


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
