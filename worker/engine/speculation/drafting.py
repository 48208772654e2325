"""Grow the draft trees of a step, layer by layer over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol, Self, runtime_checkable

import numpy as np

from worker.engine.host.growth import CompiledGrowth, Correction, Emittable
from worker.engine.host.sources import CompiledSource
from worker.engine.segments import BoolArray, IntArray
from worker.engine.sequence import Sequence
from worker.engine.speculation.constants import MAX_FORCED_READS
from worker.engine.speculation.draft_tree import Candidates, Forest
from worker.engine.speculation.tree_budget import Budget


class Drafter(Protocol):
    """A source of draft tokens. It keeps its own state per sequence and catches up lazily with committed tokens."""

    name: str

    @property
    def forward_free(self) -> Drafter | None:
        """The part of a drafter that runs no forward: itself, one of several, or None."""

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer children for the frontier nodes. Each call of a step is for the next layer of the same forest."""

    def num_uncached_tokens(self, sequence: Sequence) -> int:
        """Return how many committed tokens a forward of the drafter must read before it can draft for the sequence."""

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn what the target accepted: `path` are nodes of the drafted forest, `emitted` are the step's tokens."""

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence."""


FIRST, SECOND, BOTH = 0, 1, 2  # sources of candidates of a drafter of two parts


@runtime_checkable
class CompiledDrafter(Protocol):
    """A drafter whose candidates compiled code can find: the trees of a step grow in one call."""

    def source(self, forest: Forest, roots: IntArray) -> CompiledSource | None:
        """Return where this step's candidates are: called once, before trees grow below `roots`.

        They are those that `expand` would offer. A network that foresees all layers runs here. None: compiled code
        can't find those of this step, so `expand` is asked layer by layer.
        """


@runtime_checkable
class PartedDrafter(Protocol):
    """A drafter of one or two parts. What it offers is `merged` from what its parts offer."""

    parts: tuple[Drafter, ...]
    label: int  # source of the candidates of a part that is used alone


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a drafter, as compiled growth asks them."""

    drafters: tuple[Drafter, ...]
    compiled: tuple[CompiledDrafter | None, ...]  # None: it offers a layer at a time
    label: int

    @classmethod
    def of(cls, drafter: Drafter) -> Self:
        """Return the parts of a drafter; one of one piece is its own only part."""
        parts, label = (drafter.parts, drafter.label) if isinstance(drafter, PartedDrafter) else ((drafter,), FIRST)
        return cls(parts, tuple(part if isinstance(part, CompiledDrafter) else None for part in parts), label)


_NONE: Final[IntArray] = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Layer:
    """The candidates that a drafter offered below a frontier, with the drafter's own probabilities."""

    frontier: IntArray
    offered: Candidates


Calibrate = Callable[[Forest, Layer], Candidates]  # a drafter's probabilities -> the estimates that trees are built on


def as_offered(_: Forest, layer: Layer) -> Candidates:
    """Use the drafter's own probabilities, as OPT-Tree does."""
    return layer.offered


@dataclass(frozen=True, slots=True)
class Growth:
    """What was offered while trees grew, and where they may grow on."""

    layers: list[Layer]  # joined where that is possible
    expanded: list[int]  # nodes that each layer expanded
    detached: IntArray  # ends of forced chains: only a drafter that runs no forward can expand them


class _Reading:
    """Short chains of forced tokens that a network reads, one a layer, to draft beyond them."""

    def __init__(self, forest: Forest, max_tokens: int) -> None:
        self._forest = forest
        self._max_tokens = max_tokens
        self._below: dict[int, int] = {}  # the node to read after each

    def take(self, ends: IntArray) -> tuple[IntArray, IntArray]:
        """Take the chains that are short enough; return the nodes above them, and the ends of the others."""
        parent, forced = self._forest.parent, self._forest.forced
        above, others = [], []
        for end in ends.tolist():
            chain = [end]
            while len(chain) <= self._max_tokens and forced[chain[-1]]:
                chain.append(int(parent[chain[-1]]))
            if forced[chain[-1]]:
                others.append(end)
                continue
            above.append(chain[-1])
            self._below.update(zip(chain[1:], chain, strict=False))
        return np.array(above, np.int64), np.array(others, np.int64)

    def next(self, nodes: IntArray) -> IntArray:
        """Return what is to be read after nodes."""
        return np.array([self._below[node] for node in nodes.tolist() if node in self._below], np.int64)

    def asked(self, nodes: IntArray) -> IntArray:
        """Return the nodes that are expanded, and not only read."""
        return nodes[self._are_asked(nodes)] if self._below else nodes

    def permitted(self, frontier: IntArray, offered: Candidates) -> Candidates:
        """Return what grammars leave of the candidates: nothing beside a forced token."""
        if self._forest.masks is None:
            return offered
        offered = self._forest.masks.permitted(frontier, offered)
        if not self._below:
            return offered
        asked = self._are_asked(frontier)
        return replace(offered, probabilities=np.where(asked[:, None], offered.probabilities, 0.0))

    def _are_asked(self, nodes: IntArray) -> BoolArray:
        return np.array([node not in self._below for node in nodes.tolist()], np.bool_)


def grow(
    forest: Forest,
    drafter: Drafter,
    budget: Budget,
    max_depth: int,
    roots: IntArray,
    calibrate: Calibrate = as_offered,
    forced: IntArray = _NONE,
) -> Growth:
    """Grow the trees below `roots` in place and return what was offered.

    `forced` are the ends of chains that grammars force below some of them.

    Gains never rise with depth: a layer splits the value of the one above it. So the first layer that is not worth its
    cost is the right place to stop. Nodes of that layer can still be selected, since they are drafted already.

    Where a grammar forces the next tokens, they become nodes and the drafter proposes nothing. One that runs no forward
    continues below them. A network has to read them before: it does if they are few.
    """
    layers: list[Layer] = []
    reading = _Reading(forest, MAX_FORCED_READS)
    everywhere = drafter.forward_free is drafter
    detached = [_NONE if everywhere else reading.take(forced)[1]]
    frontier = forest.expandable(np.concatenate([roots, forced]) if everywhere and len(forced) else roots)
    while len(frontier) and len(layers) < max_depth:
        offered = reading.permitted(frontier, drafter.expand(forest, frontier))
        layers.append(Layer(frontier, offered))
        added = _NONE
        if offered.probabilities.any():
            added = forest.add_layer(frontier, calibrate(forest, layers[-1]), budget.min_value)
        read, asked = reading.next(frontier), reading.asked(frontier)
        further = budget.frontier(forest, asked, added) if len(asked) else added
        frontier, ends = forest.force(forest.expandable(further))
        if everywhere:
            more = ends
        else:
            above, others = reading.take(ends)
            more = np.concatenate([above, read])
            detached.append(others)
        if len(more):
            frontier = forest.expandable(np.concatenate([frontier, more]))
    return Growth(joined(layers), [len(layer.frontier) for layer in layers], np.concatenate(detached))


def grow_compiled(
    growth: CompiledGrowth,
    forest: Forest,
    parts: Parts,
    budget: Budget,
    max_depth: int,
    roots: IntArray,
    correction: Correction | None,
) -> Growth:
    """Grow the trees below `roots` as `grow` does, but in C: in one call a layer, or in one if all parts are compiled.

    No tree has a grammar. `correction` None: build the trees on the drafter's own probabilities. What was offered is
    in memory that the next step's growth overwrites.
    """
    emittable = Emittable(*forest.columns.end_keys, forest.remaining)
    if not growth.begin(forest, roots, emittable, correction, budget.rules()):
        return Growth([], [], _NONE)
    first = growth.frontier
    sources = [None if part is None else part.source(forest, first) for part in parts.compiled]
    waiting = [index for index, source in enumerate(sources) if source is None]
    growth.use(sources, parts.label)
    if not waiting:
        growth.grow(forest, max_depth)
    for _ in range(max_depth if waiting else 0):
        frontier = growth.frontier
        for index in waiting:
            offered = parts.drafters[index].expand(forest, frontier)
            growth.write(index, offered.tokens, offered.probabilities, offered.source)
        if not growth.grow(forest, 1):
            break
    expanded, tokens, probabilities, labels = growth.offered()
    return Growth([Layer(expanded, Candidates(tokens, probabilities, labels))], growth.layer_rows(), _NONE)


def merged(a: Candidates, b: Candidates) -> Candidates:
    """Return the candidates of both; a token that both offer keeps its position in `a`."""
    if not b.probabilities.any():
        return a
    p, q = a.probabilities.astype(np.float64), b.probabilities.astype(np.float64)
    same = (a.tokens[:, :, None] == b.tokens[:, None, :]) & (p > 0)[:, :, None] & (q > 0)[:, None, :]
    # Noisy-or: right unless both are wrong. They are not independent; the acceptance model learns the difference.
    both = 1.0 - (1.0 - p) * (1.0 - np.where(same, q[:, None, :], 0.0).max(axis=2))
    return Candidates(
        tokens=np.concatenate([a.tokens, b.tokens], axis=1),
        probabilities=np.concatenate([both, np.where(same.any(axis=1), 0.0, q)], axis=1),
        source=np.concatenate([np.where(same.any(axis=2), BOTH, FIRST), np.full_like(b.tokens, SECOND)], axis=1),
    )


def joined(layers: list[Layer]) -> list[Layer]:
    """Return the layers as one where that is possible: their offers are equally wide and of the same kind."""
    offers = [layer.offered for layer in layers]
    if len({(one.tokens.shape[1], one.source is None) for one in offers}) != 1 or len(layers) == 1:
        return layers
    sources = [one.source for one in offers if one.source is not None]
    candidates = Candidates(
        tokens=np.concatenate([one.tokens for one in offers]),
        probabilities=np.concatenate([one.probabilities for one in offers]),
        source=np.concatenate(sources) if sources else None,
    )
    return [Layer(np.concatenate([layer.frontier for layer in layers]), candidates)]
