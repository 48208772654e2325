"""Model drafter: a smaller language model with the target's tokens, its own KV slots, and the target's noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from worker.drafters.candidates import best_children
from worker.drafters.kv_tracker import DraftSlots, by_slot
from worker.engine.errors import OutOfBlocks
from worker.engine.model.packed_model import LanguageModel
from worker.engine.segments import BoolArray, IntArray, KvMove, Segment
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest


@dataclass(frozen=True, slots=True, eq=False)
class SharedVocabulary:
    """The token ids that a draft model shares with its target."""

    ids: IntArray  # ascending: ids of the same text in both; only these are drafted
    readable: int  # the draft model can read the ids below

    @property
    def is_prefix(self) -> bool:
        """True if the shared ids are 0, 1, 2, … without a gap."""
        return bool(len(self.ids)) and int(self.ids[-1]) == len(self.ids) - 1


class ModelDrafter:
    """Drafts with an independent causal model."""

    def __init__(
        self,
        model: LanguageModel,
        name: str,
        vocab: int,
        *,
        shared: SharedVocabulary | None = None,
        positions: int | None = None,
    ) -> None:
        """Draft with `model`, whose KV slots have the target's numbers; the target's ids are those below `vocab`.

        `shared` are the ids that both have (None: all). Nothing is drafted beyond `positions`, the model's context.
        """
        self.name = name
        self.forward_free = None  # every draft takes a forward
        self._model = model
        self._shared = shared or SharedVocabulary(np.arange(vocab), vocab)
        self._vocab = vocab
        self._ids = torch.from_numpy(self._shared.ids)
        self._positions = positions
        self._slots = DraftSlots()
        model.clear()  # of the sequences of an earlier drafter

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the model over the frontier and offer its best children; none beyond the model's context."""
        inside = np.flatnonzero(self._in_context(forest, frontier))
        by_tree = [inside[some] for some in by_slot(forest, frontier[inside])] if len(inside) else []
        logits = None
        while by_tree and (logits := self._run(forest, [frontier[some] for some in by_tree])) is None:
            by_tree = by_tree[: len(by_tree) // 2]  # memory is short: draft for fewer sequences
        if logits is None:
            return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))
        order = np.concatenate(by_tree)
        self._ids = self._ids.to(logits.device)
        logits = logits[:, : len(self._ids)] if self._shared.is_prefix else logits[:, self._ids]
        ids, scores = best_children(forest, frontier[order], logits, self._ids, self._vocab)
        tokens = np.zeros((len(frontier), ids.shape[1]), ids.dtype)
        probabilities = np.zeros((len(frontier), ids.shape[1]), scores.dtype)
        tokens[order], probabilities[order] = ids, scores
        return Candidates(tokens, probabilities)

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the tokens to feed before the first layer can be drafted."""
        if self._positions is not None and len(sequence.ids) > self._positions:
            return 0
        return self._slots.num_uncached_tokens(sequence)

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Compact the KV entries of accepted nodes to follow the committed ones; not every node was run."""
        sequence = forest.sequences[tree]
        slot = self._slots.of(sequence)
        if not slot.nodes:
            return
        offsets = {node: i for i, node in enumerate(slot.nodes)}
        run = [offsets[int(node)] for node in path if int(node) in offsets][: len(emitted)]
        self._model.compact([KvMove(sequence.slot, slot.cached, slot.cached + np.array(run, np.int64))])
        slot.cached += len(run)
        slot.nodes.clear()

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        slot = self._slots.drop(sequence)
        if slot is not None:
            self._model.truncate(slot, 0)

    def _in_context(self, forest: Forest, nodes: IntArray) -> BoolArray:
        """Return which nodes have positions within the model's context."""
        if self._positions is None:
            return np.ones(len(nodes), np.bool_)
        lengths = np.array([len(sequence.ids) for sequence in forest.sequences])
        return lengths[forest.tree[nodes]] + forest.depth[nodes] <= self._positions

    def _run(self, forest: Forest, layer: list[IntArray]) -> Tensor | None:
        """Return the logits of one layer of every tree; None, and no rows, if the draft's KV memory can't hold them."""
        sequences = [forest.sequences[int(forest.tree[nodes[0]])] for nodes in layer]
        before = self._slots.state(sequences)
        try:
            return self._forward(self._segments(forest, sequences, layer))
        except OutOfBlocks:
            for slot, length in self._slots.restore(before):
                self._model.truncate(slot, length)
            return None

    def _forward(self, segments: list[Segment]) -> Tensor:
        """Run rows, with unreadable tokens replaced by token 0."""
        readable = self._shared.readable
        return self._model.forward(
            [replace(s, ids=np.where(s.ids < readable, s.ids, 0)) if (s.ids >= readable).any() else s for s in segments]
        )

    def _segments(self, forest: Forest, sequences: list[Sequence], layer: list[IntArray]) -> list[Segment]:
        """Return the rows of one layer of every tree."""
        if not forest.depth[layer[0][0]]:
            return self._slots.catch_up(sequences, lambda segment: self._forward([segment]), self._model.copy_prefix)
        return [self._slots.tree_rows(forest, *one) for one in zip(sequences, layer, strict=True)]
