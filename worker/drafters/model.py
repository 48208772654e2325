"""Model drafter: a smaller language model with the target's tokens, its own KV slots, and the same noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from worker.drafters.candidates import best_children
from worker.drafters.kv_tracker import DraftSlots, by_slot
from worker.engine.model.packed_model import LanguageModel
from worker.engine.segments import BoolArray, IntArray, KvMove, Segment
from worker.engine.sequence import Sequence
from worker.engine.speculation.draft_tree import Candidates, Forest


@dataclass(frozen=True, slots=True, eq=False)
class SharedVocabulary:
    """The token ids that a draft has in common with its target."""

    ids: IntArray  # ascending: those that both spell alike, which are drafted
    readable: int  # the draft can read those below

    @property
    def is_prefix(self) -> bool:
        """True if they are the first ones of all."""
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
        """Use `model` for slots numbered as those of the target, which has the ids below `vocab`.

        `shared` are the tokens of both, where they differ. Nothing is drafted at `positions` and beyond.
        """
        self.name = name
        self.forward_free = None  # it is a network and nothing else
        self._model = model
        self._shared = shared or SharedVocabulary(np.arange(vocab), vocab)
        self._vocab = vocab
        self._every = torch.from_numpy(self._shared.ids)
        self._positions = positions
        self._slots = DraftSlots()
        model.clear()  # of an earlier drafter's texts

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the model over the frontier and offer its best children; none beyond the positions that it knows."""
        known = np.flatnonzero(self._knows(forest, frontier))
        places = [known[some] for some in by_slot(forest, frontier[known])] if len(known) else []
        if not places:
            return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))
        order = np.concatenate(places)
        logits = self._forward(self._segments(forest, [frontier[some] for some in places]))
        self._every = self._every.to(logits.device)
        logits = logits[:, : len(self._every)] if self._shared.is_prefix else logits[:, self._every]
        ids, scores = best_children(forest, frontier[order], logits, self._every, self._vocab)
        tokens = np.zeros((len(frontier), ids.shape[1]), ids.dtype)
        probabilities = np.zeros((len(frontier), ids.shape[1]), scores.dtype)
        tokens[order], probabilities[order] = ids, scores
        return Candidates(tokens, probabilities)

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return the tokens that are to be fed before the first layer can be drafted."""
        if self._positions is not None and len(sequence.ids) > self._positions:
            return 0
        return self._slots.num_uncached_tokens(sequence)

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Bring the accepted nodes that were run down behind the committed tokens."""
        sequence = forest.sequences[tree]
        slot = self._slots.of(sequence)
        if not slot.nodes:
            return
        places = {node: i for i, node in enumerate(slot.nodes)}
        run = [places[int(node)] for node in path if int(node) in places][: len(emitted)]
        self._model.compact([KvMove(sequence.slot, slot.cached, slot.cached + np.array(run, np.int64))])
        slot.cached += len(run)
        slot.nodes.clear()

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._slots.drop(sequence)
        self._model.truncate(sequence.slot, 0)

    def _knows(self, forest: Forest, nodes: IntArray) -> BoolArray:
        """Return which nodes stand at positions that the model knows."""
        if self._positions is None:
            return np.ones(len(nodes), np.bool_)
        lengths = np.array([len(sequence.ids) for sequence in forest.sequences])
        return lengths[forest.tree[nodes]] + forest.depth[nodes] <= self._positions

    def _forward(self, segments: list[Segment]) -> Tensor:
        """Run rows, with tokens that the model does not know replaced by one that it does."""
        known = self._shared.readable
        return self._model.forward(
            [replace(s, ids=np.where(s.ids < known, s.ids, 0)) if (s.ids >= known).any() else s for s in segments]
        )

    def _segments(self, forest: Forest, layer: list[IntArray]) -> list[Segment]:
        """Return the rows of one layer of every tree."""
        sequences = [forest.sequences[int(forest.tree[nodes[0]])] for nodes in layer]
        if not forest.depth[layer[0][0]]:
            return self._slots.rest(sequences, lambda segment: self._forward([segment]), self._model.copy_prefix)
        return [self._slots.below(forest, *one) for one in zip(sequences, layer, strict=True)]
