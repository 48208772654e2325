"""Ranking: from a draft's logits to the children it offers below each node.

Above temperature 0 the tokens are ranked with the very noise the target will draw with, which lifts agreement and can't
bend the law.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worker.engine.sampling.sampling import gumbel_scores, process, topk
from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import FloatArray, Forest

_WIDTH = 8  # children per node at most


@torch.inference_mode()
def best_children(
    forest: Forest, nodes: IntArray, logits: Tensor, tokens: Tensor, vocabulary: int
) -> tuple[IntArray, FloatArray]:
    """Return tokens and probabilities [nodes, k] of the best children under each node's own noise and filters.

    `logits` [nodes, n] are of `tokens` [n] out of the target's `vocabulary`; a node offers no other.
    """
    scores = _adjusted(forest, nodes, logits.float(), tokens, vocabulary)
    sequences = [forest.sequences[tree] for tree in forest.tree[nodes]]
    sampled = [i for i, s in enumerate(sequences) if not s.sampling.greedy]
    if sampled:
        samplings = [sequences[i].sampling for i in sampled]
        positions = [len(sequences[i].ids) + int(forest.depth[nodes[i]]) for i in sampled]
        scores[sampled] = gumbel_scores(process(scores[sampled], samplings), samplings, positions, tokens)
    places, probabilities = topk(scores, min(_WIDTH, scores.shape[1]))
    return tokens[places].cpu().numpy(), probabilities.cpu().numpy()


def _adjusted(forest: Forest, nodes: IntArray, logits: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the logits under penalties and bias, which are told by the target's ids."""
    if len(tokens) == vocabulary or not any(s.sampling.adjusted for s in forest.sequences):
        return forest.adjusted(logits, nodes)
    every = logits.new_full((len(logits), vocabulary), -torch.inf)
    every[:, tokens] = logits
    return forest.adjusted(every, nodes)[:, tokens]
