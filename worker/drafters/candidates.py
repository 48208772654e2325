"""From a draft's logits to the candidates that it offers below each node.

Above temperature 0 candidates are ranked with the same Gumbel noise that the target will draw with (Gumbel coupling,
arXiv 2408.07978). That raises acceptance. The draw is the target's alone, so its distribution stays exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worker.engine.host.nodes import FloatArray
from worker.engine.sampling.sampling import gumbel_scores, process, topk
from worker.engine.segments import IntArray
from worker.engine.speculation.draft_tree import Forest
from worker.engine.speculation.tree_masks import TreeMasks

MAX_CHILDREN = 8  # of a node: more are rarely drawn, and cost time in every layer


@torch.inference_mode()
def best_children(
    forest: Forest, nodes: IntArray, logits: Tensor, tokens: Tensor, vocabulary: int
) -> tuple[IntArray, FloatArray]:
    """Return tokens and probabilities [nodes, k] of the best children, with each node's own noise and filters.

    `logits` [nodes, n] are of `tokens` [n], the ids out of the target's `vocabulary` that the draft can propose.
    """
    scores = _adjusted(forest, nodes, logits.float(), tokens, vocabulary)
    if forest.masks is not None:
        scores = _masked(forest.masks, nodes, scores, tokens, vocabulary)
    trees = forest.tree[nodes]
    sampled = np.flatnonzero(forest.sampled[trees])
    if len(sampled):
        parameters = forest.parameters[trees[sampled]]
        positions = forest.lengths[trees[sampled]] + forest.depth[nodes[sampled]]
        scores[sampled] = gumbel_scores(process(scores[sampled], parameters), parameters, positions, tokens)
    indices, probabilities = topk(scores, min(MAX_CHILDREN, scores.shape[1]))
    return _on_host(tokens[indices], probabilities)


def _on_host(tokens: Tensor, probabilities: Tensor) -> tuple[IntArray, FloatArray]:
    """Return both as arrays. From a GPU they come in one copy, for which the host waits once: tokens fit float64."""
    if tokens.device.type == "cpu":
        return tokens.numpy(), probabilities.numpy()
    both = torch.stack([tokens.double(), probabilities.double()]).cpu().numpy()
    return both[0].astype(np.int64), both[1]


def _masked(masks: TreeMasks, nodes: IntArray, scores: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the scores with minus infinity for the tokens that grammars forbid, as the target draws them."""
    bound, words = masks.masks(nodes)
    if not len(bound):
        return scores
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    forbidden = torch.from_numpy(bits == 0).to(scores.device)
    forbidden = forbidden[:, :vocabulary] if len(tokens) == vocabulary else forbidden[:, tokens]
    rows = torch.from_numpy(bound).to(scores.device)
    return scores.index_put((rows,), scores[rows].masked_fill(forbidden, -torch.inf))


def _adjusted(forest: Forest, nodes: IntArray, logits: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """Return the logits under penalties and bias, which are given by the target's ids."""
    if len(tokens) == vocabulary or not any(s.sampling.adjusted for s in forest.sequences):
        return forest.adjusted(logits, nodes)
    expanded = logits.new_full((len(logits), vocabulary), -torch.inf)
    expanded[:, tokens] = logits
    return forest.adjusted(expanded, nodes)[:, tokens]
