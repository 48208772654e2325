"""Block drafter: one forward a step gives tables for all depths of a tree; its layers only look them up.

The tables of a tree are base logits [depth, n] over the tokens that it can propose, and gates [depth, 2 * rank] of the
path head (`block_network`). A node's logits are the base logits of its depth plus the path head's product
(`block_paths`). All of them are float32.
"""

from __future__ import annotations

from collections import deque
from functools import cache, lru_cache
from statistics import median_high
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from worker.drafters.block_beam import make_paths
from worker.drafters.block_network import BlockNetwork
from worker.drafters.block_paths import PathTables, TreeDraws
from worker.drafters.candidates import MAX_CHILDREN, best_children
from worker.drafters.eagle3_network import Eagle3Network
from worker.drafters.head import HeadDrafter, PackedHead, PackOptions
from worker.drafters.head_network import HeadNetwork
from worker.drafters.kv_tracker import by_slot
from worker.engine.host.sources import CompiledSource
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.sampling.parameters import noise_keys
from worker.engine.segments import BoolArray, IntArray, Segment
from worker.engine.speculation.draft_tree import Candidates, Forest

# The next step foresees the median depth of their trees, and one layer more: a row of the network each.
_RECENT_STEPS = 16
_MAX_CHAIN = 16  # committed tokens in the forward of a block; more are fed before, without a mask


class PackedBlock(PackedHead):
    """A block drafter's network with one KV slot per sequence."""

    def __init__(
        self,
        network: BlockNetwork,
        embedding: Tensor,
        output: Tensor,
        tokens: Tensor,
        **options: Unpack[PackOptions],
    ) -> None:
        """Wrap a network, which is changed in place; the parameters are those of `PackedHead`."""
        self.depth = network.shape.depth
        self.paths = PathTables(network, embedding, output, tokens)  # looked up below the roots
        moved = network.offsets.detach().to(embedding.device, embedding.dtype)
        self.offsets = torch.cat([moved.new_zeros(1, moved.shape[1]), moved])  # [depth, width]; none for the root
        del network.path, network.offsets
        super().__init__(network, embedding, output, tokens, **options)
        if self._backend.kernels is not None:
            self.paths.pack(self._backend.kernels)

    @torch.inference_mode()
    def with_block(self, states: Tensor, counts: tuple[int, ...], depth: int) -> Tensor:
        """Return the states [rows, width] of chains of `counts` tokens, each followed by those of a block below it."""
        source, moved = (torch.from_numpy(part).to(states.device) for part in _block_rows(counts, depth))
        return states.index_select(0, source).add_(self.offsets.index_select(0, moved))


class BlockDrafter(HeadDrafter):
    """A `Drafter` that runs its network once a step. It is a `CompiledDrafter`."""

    _head: PackedBlock

    def __init__(self, block: PackedBlock, hidden: HiddenStates, name: str) -> None:
        """Use a network with the slot numbers of the target, whose hidden states are in `hidden`."""
        super().__init__(block, hidden, name)
        self._paths = make_paths(block.paths, min(MAX_CHILDREN, len(block.tokens)))
        self._depth = block.depth  # of this step's tables
        self._needed = deque([block.depth], _RECENT_STEPS)
        self._committed: Forest | None = None

    def source(self, forest: Forest, roots: IntArray) -> CompiledSource | None:
        """Run the network and return where C finds what `expand` would offer; None under penalties or biases.

        On a GPU these are the candidates of a beam, and it is None above temperature 0 too.
        """
        drawn = bool(forest.sampled.any())
        adjusted = forest.parameters[forest.tree[roots]]["adjusted"].any()
        if not self._paths.looks_ahead or (drawn and not self._paths.draws) or adjusted:
            return None
        self._run(forest, roots)
        return self._paths.source(self._draws(forest) if drawn else None)

    def _draws(self, forest: Forest) -> TreeDraws:
        """Return what a draw needs to know of all trees."""
        positions = (forest.lengths[:, None] + np.arange(self._depth)).ravel()
        keys = noise_keys(np.repeat(forest.parameters, self._depth), positions).view(np.int64)
        sampled, parameters = np.ascontiguousarray(forest.sampled), np.ascontiguousarray(forest.parameters)
        return TreeDraws(sampled, parameters, keys.reshape(-1, self._depth))

    @torch.inference_mode()
    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the best children of the frontier; below the last depth none."""
        if not forest.depth[frontier[0]]:
            self._run(forest, frontier)
        known = np.flatnonzero(forest.depth[frontier] < self._depth)
        nodes = frontier[known]
        if not len(nodes):
            return Candidates(np.zeros((len(frontier), 1), np.int64), np.zeros((len(frontier), 1)))
        logits = self._paths.logits(forest, nodes)
        ids, scores = best_children(forest, nodes, logits, self._head.tokens, self._head.vocabulary)
        if len(nodes) == len(frontier):
            return Candidates(ids, scores)
        tokens = np.zeros((len(frontier), ids.shape[1]), ids.dtype)
        probabilities = np.zeros((len(frontier), ids.shape[1]), scores.dtype)
        tokens[known], probabilities[known] = ids, scores
        return Candidates(tokens, probabilities)

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn how deep trees get. No node has an entry, and accepted tokens are read with the target's states."""
        if forest is not self._committed and self._paths.any_depth:
            self._committed = forest
            self._needed.append(min(int(forest.depth.max()) + 1, self._head.depth))

    def _run(self, forest: Forest, roots: IntArray) -> None:
        """Run the network over the uncached tokens and the block of each root; keep the tables."""
        trees = forest.tree[roots][np.concatenate(by_slot(forest, roots))]
        sequences = [forest.sequences[tree] for tree in trees.tolist()]
        chains = self._slots.catch_up(sequences, self._feed, self._head.copy_prefix, _MAX_CHAIN)
        nothing = torch.empty(0)  # the next tables may take the memory of the last ones
        self._paths.begin(nothing, nothing, trees, 0)
        depth = self._depth = median_high(self._needed)
        states = self._head.with_block(self._before(chains), tuple(len(one.ids) for one in chains), depth)
        logits, outputs = self._head.forward([_with_block(one, depth) for one in chains], states)
        block_of = np.full(len(forest.sequences), -1)
        block_of[trees] = np.arange(len(trees))
        self._paths.begin(logits.float(), self._head.paths.gates(outputs), block_of, depth)


def _with_block(chain: Segment, depth: int) -> Segment:
    """Return a chain that ends in a root, with the rows of its block."""
    count, end = len(chain.ids), int(chain.positions[-1]) + 1
    return Segment(
        slot=chain.slot,
        prefix=chain.prefix,
        start=chain.start,
        ids=np.append(chain.ids, np.repeat(chain.ids[-1], depth - 1)),
        positions=np.append(chain.positions, np.arange(end, end + depth - 1)),
        visible=_visible(count, depth),
        keep=np.arange(count - 1, count + depth - 1),
    )


def pack_head(
    network: HeadNetwork | Eagle3Network,
    embedding: Tensor,
    output: Tensor,
    tokens: Tensor,
    **options: Unpack[PackOptions],
) -> PackedHead:
    """Pack a head of any kind: see `PackedHead`."""
    if isinstance(network, BlockNetwork):
        return PackedBlock(network, embedding, output, tokens, **options)
    return PackedHead(network, embedding, output, tokens, **options)


def head_drafter(packed: PackedHead, hidden: HiddenStates, name: str) -> HeadDrafter:
    """Return a drafter that runs a head of any kind."""
    return (BlockDrafter if isinstance(packed, PackedBlock) else HeadDrafter)(packed, hidden, name)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _block_rows(counts: tuple[int, ...], depth: int) -> tuple[IntArray, IntArray]:
    """Return for each row of chains with their blocks the row of the chains that it repeats, and its depth there."""
    last = np.cumsum(counts) - 1
    source = [
        np.append(np.arange(end - count + 1, end + 1), np.repeat(end, depth - 1))
        for count, end in zip(counts, last, strict=True)
    ]
    moved = [np.append(np.zeros(count, np.int64), np.arange(1, depth)) for count in counts]
    return np.concatenate(source), np.concatenate(moved)


@cache
def _visible(count: int, depth: int) -> BoolArray:
    """Return the mask [rows, rows] of `count` tokens of a chain and a block: the block's rows see the chain alone."""
    rows = count + depth - 1
    mask = np.zeros((rows, rows), np.bool_)
    mask[:, :count] = np.tri(rows, count, dtype=np.bool_)
    return mask
