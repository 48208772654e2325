"""Model drafter: a smaller language model with the target's tokens, its own KV slots, and the same noise."""

from __future__ import annotations

import numpy as np
import torch

from worker.drafters.lanes import Lanes, by_slot
from worker.drafters.ranking import best_children
from worker.engine.draft_tree import Candidates, Forest
from worker.engine.language_model import LanguageModel
from worker.engine.rows import IntArray, Move, Segment
from worker.engine.sequence import Sequence


class ModelDrafter:
    """Drafts with an independent causal model."""

    def __init__(self, model: LanguageModel, name: str, vocab: int) -> None:
        """Use `model` for slots numbered as the target's; draft only ids below `vocab`, which both models know."""
        self.name = name
        self.free = None  # it is a network and nothing else
        self._model = model
        self._vocab = vocab
        self._lanes = Lanes()
        model.clear()  # of an earlier drafter's texts

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Run the model over the frontier and offer its best children."""
        places = by_slot(forest, frontier)
        order = np.concatenate(places)
        logits = self._model.forward(self._segments(forest, [frontier[some] for some in places]))[:, : self._vocab]
        every = torch.arange(self._vocab, device=logits.device)
        ids, scores = best_children(forest, frontier[order], logits, every, self._vocab)
        tokens, probabilities = np.empty_like(ids), np.empty_like(scores)
        tokens[order], probabilities[order] = ids, scores
        return Candidates(tokens, probabilities)

    def behind(self, sequence: Sequence) -> int:
        """Return the tokens that are to be fed before the first layer can be drafted."""
        return self._lanes.behind(sequence)

    def keep(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Bring the accepted nodes that were run down behind the committed tokens."""
        sequence = forest.sequences[tree]
        lane = self._lanes.of(sequence)
        if not lane.nodes:
            return
        places = {node: i for i, node in enumerate(lane.nodes)}
        run = [places[int(node)] for node in path if int(node) in places][: len(emitted)]
        self._model.keep([Move(sequence.slot, lane.cached, lane.cached + np.array(run, np.int64))])
        lane.cached += len(run)
        lane.nodes.clear()

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""
        self._lanes.drop(sequence)
        self._model.release(sequence.slot, 0)

    def _segments(self, forest: Forest, layer: list[IntArray]) -> list[Segment]:
        """Return the rows of one layer of every tree."""
        sequences = [forest.sequences[int(forest.tree[nodes[0]])] for nodes in layer]
        if not forest.depth[layer[0][0]]:
            return self._lanes.rest(sequences, lambda segment: self._model.forward([segment]), self._model.share)
        return [self._lanes.below(forest, *one) for one in zip(sequences, layer, strict=True)]
