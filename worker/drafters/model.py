"""Model drafter: a smaller language model with the target's tokens, its own KV slots, and the same noise.

Its KV lags behind lazily: the first layer of a step feeds whatever committed tokens it has not seen. Above temperature
0 it ranks its tokens with the very noise the target will draw with, which lifts agreement and can't bend the law.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from worker.engine.draft_tree import Candidates, FloatArray, Forest
from worker.engine.language_model import LanguageModel
from worker.engine.rows import BoolArray, IntArray, Move, Segment, chain
from worker.engine.sampling import gumbel, process, row_keys
from worker.engine.sequence import Sequence

_WIDTH = 8  # children per node at most
_CATCH_UP_ROWS = 512  # committed tokens fed in one forward


@dataclass(slots=True)
class _Lane:
    """One sequence's place in the draft's KV slot."""

    cached: int = 0  # committed tokens in the slot
    nodes: list[int] = field(default_factory=list)  # forest nodes whose keys lie behind them, in KV order


class ModelDrafter:
    """Drafts with an independent causal model."""

    def __init__(self, model: LanguageModel, name: str, vocab: int) -> None:
        """Use `model` for slots numbered as the target's; draft only ids below `vocab`, which both models know."""
        self.name = name
        self._model = model
        self._vocab = vocab
        self._lanes: dict[int, _Lane] = {}

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the model over the frontier and offer its best children."""
        trees = forest.tree[frontier]
        in_slot_order = sorted(set(trees.tolist()), key=lambda tree: forest.sequences[tree].slot)
        order = np.concatenate([np.flatnonzero(trees == tree) for tree in in_slot_order])
        segments = [self._segment(forest, tree, frontier[trees == tree]) for tree in in_slot_order]
        ids, scores = self._best(forest, frontier[order], self._model.forward(segments))
        tokens, probabilities = np.empty_like(ids), np.empty_like(scores)
        tokens[order], probabilities[order] = ids, scores
        return Candidates(tokens, probabilities)

    def behind(self, sequence: Sequence) -> int:
        """Return the tokens that are to be fed before the first layer can be drafted."""
        lane = self._lanes.get(id(sequence))
        return len(sequence.ids) - (lane.cached if lane else 0)

    def keep(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Bring the accepted nodes that were run down behind the committed tokens."""
        sequence = forest.sequences[tree]
        lane = self._lanes.get(id(sequence))
        if lane is None or not lane.nodes:
            return
        places = {node: i for i, node in enumerate(lane.nodes)}
        run = [places[int(node)] for node in path if int(node) in places][: len(emitted)]
        self._model.keep([Move(sequence.slot, lane.cached, lane.cached + np.array(run, np.int64))])
        lane.cached += len(run)
        lane.nodes.clear()

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._lanes.pop(id(sequence), None)

    def _segment(self, forest: Forest, tree: int, nodes: IntArray) -> Segment:
        sequence = forest.sequences[tree]
        lane = self._lanes.setdefault(id(sequence), _Lane())
        if forest.depth[nodes[0]] == 0:
            return self._catch_up(sequence, lane)
        earlier = len(lane.nodes)
        lane.nodes += nodes.tolist()
        return Segment(
            slot=sequence.slot,
            prefix=lane.cached,
            start=lane.cached + earlier,
            ids=forest.token[nodes],
            positions=len(sequence.ids) - 1 + forest.depth[nodes],
            visible=_ancestors(forest, lane.nodes)[earlier:],
            keep=np.arange(len(nodes)),
        )

    def _catch_up(self, sequence: Sequence, lane: _Lane) -> Segment:
        """Feed the committed tokens that the slot lacks; the newest one is the root of this step's tree."""
        while len(sequence.ids) - lane.cached > _CATCH_UP_ROWS:
            ids = sequence.ids[lane.cached : lane.cached + _CATCH_UP_ROWS]
            self._model.forward([chain(sequence.slot, lane.cached, ids, keep_last=True)])
            lane.cached += len(ids)
        segment = chain(sequence.slot, lane.cached, sequence.ids[lane.cached :], keep_last=True)
        lane.cached = len(sequence.ids)
        lane.nodes.clear()
        return segment

    @torch.inference_mode()
    def _best(self, forest: Forest, nodes: IntArray, logits: Tensor) -> tuple[IntArray, FloatArray]:
        """Return ids and probabilities [nodes, k] of the best children under each node's own noise and filters."""
        scores = forest.adjusted(logits[:, : self._vocab].float(), nodes)
        sequences = [forest.sequences[tree] for tree in forest.tree[nodes]]
        sampled = [i for i, s in enumerate(sequences) if not s.sampling.greedy]
        if sampled:
            samplings = [sequences[i].sampling for i in sampled]
            positions = [len(sequences[i].ids) + int(forest.depth[nodes[i]]) for i in sampled]
            noise = gumbel(
                row_keys(samplings, positions, scores.device), torch.arange(scores.shape[1], device=scores.device)
            )
            scores[sampled] = (process(scores[sampled], samplings) + noise).float()
        best = scores.softmax(-1).topk(min(_WIDTH, scores.shape[1]), dim=-1)
        return best.indices.cpu().numpy(), best.values.double().cpu().numpy()


def _ancestors(forest: Forest, nodes: list[int]) -> BoolArray:
    """Return [n, n]: which of `nodes` (parents first) each one sees: its ancestors and itself."""
    place = {node: i for i, node in enumerate(nodes)}
    seen = np.eye(len(nodes), dtype=np.bool_)
    for i, node in enumerate(nodes):
        parent = place.get(int(forest.parent[node]))
        if parent is not None:
            seen[i] |= seen[parent]
    return seen
