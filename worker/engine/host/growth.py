"""Grow draft trees in C: call the functions of growth.c with a memory that all steps of an engine share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from worker.engine.cpu.compiler import EXACT, library
from worker.engine.cpu.kernels import address, bound, members
from worker.engine.host.bins import Bins
from worker.engine.host.nodes import FloatArray, Nodes
from worker.engine.host.sources import NO_FUNCTION, BigramSource, CompiledSource, SourceLayout
from worker.engine.segments import BoolArray, IntArray

_SIZE, _ADDRESS, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_MAX_SOURCES = 2
_FULL = -1  # `FULL` of growth.c
_CAPACITY = 256  # nodes that may be expanded in a step, at first


class GrowthLayout(ctypes.Structure):
    """`growth_t` of growth.c."""

    _fields_ = (
        *members("groups keys remaining", _ADDRESS),
        ("key_count", _SIZE),
        *members("bins sampled", _ADDRESS),
        ("limit", _REAL),
        *members("capacity width", _SIZE),
        *members("frontier tokens sources probabilities layer_rows", _ADDRESS),
        *members("layers first rows", _SIZE),
        ("source", SourceLayout * _MAX_SOURCES),
        *members("source_count label priced nodes", _SIZE),
        ("threshold", _REAL),
        ("sums", _ADDRESS),
        *members("price rows_before entries drift entry_ms min_value min_gain", _REAL),
        *members("sizes points", _ADDRESS),
        *members("points_count node_limit prices_known", _SIZE),
        *members("row_prices best_child", _ADDRESS),
        ("depth_classes", _SIZE),
        *members("best_child_weight best_child_recovery", _REAL),
        ("layer_ms", _ADDRESS),
    )


class Emittable(NamedTuple):
    """What may be emitted below nodes: `end_keys` of the trees' columns, and the tokens left in each tree."""

    groups: IntArray  # [trees]
    keys: IntArray  # sorted
    remaining: IntArray  # [trees]


class Correction(NamedTuple):
    """How offered probabilities become the estimates that trees are built on."""

    bins: Bins
    sampled: BoolArray  # [trees]
    limit: float  # the highest estimate


class Decay(NamedTuple):
    """How counts of acceptance are forgotten, once a step."""

    weight: float  # of the counts so far
    prior: float  # what they decay to


class FixedRules(NamedTuple):
    """The rules of `FixedBudget`."""

    nodes: int  # of one tree
    threshold: float  # growth of E(A) above which a tree grows on


class PricedRules(NamedTuple):
    """The rules of `CostAwareBudget`, for one step."""

    nodes: int  # of one tree
    node_limit: int  # of the step
    price: float  # tokens per ms
    rows: int  # of the step without drafts
    entries: float  # KV entries that they attend to
    min_gain: float  # tokens that the best cut must bring
    drift: float  # of the cost curve
    entry_ms: float
    sizes: FloatArray  # [points] rows
    points: FloatArray  # [points] ms
    best_child: FloatArray  # [depth classes, 2] value and samples; growth learns it
    best_child_weight: float
    best_child_recovery: float
    layer_ms: FloatArray  # by load class; NaN: never seen


class CompiledGrowth:
    """The growth of one step at a time."""

    def __init__(self, compiled: ctypes.CDLL, max_layers: int) -> None:
        """Bind the functions of a library compiled from growth.c, for trees of at most `max_layers` layers."""
        functions = ctypes.PyDLL(compiled._name)
        self._grow = bound(functions.grow, _ADDRESS, _ADDRESS, _SIZE, result=_SIZE)
        self._begin = bound(functions.begin_growth, _ADDRESS, _ADDRESS, result=_SIZE)
        self._learn = bound(functions.learn, *[_ADDRESS] * 7, _SIZE, _REAL, _REAL)
        self._cut = bound(functions.cut, *[_ADDRESS] * 4, result=_SIZE)
        self._layout = GrowthLayout()
        self._pointer = ctypes.addressof(self._layout)
        self._slots = [self._layout.source[index] for index in range(_MAX_SOURCES)]
        self._layer_rows = np.empty(max_layers, np.int64)
        self._layout.layer_rows = address(self._layer_rows)
        self._row_prices, self._sums = np.empty(0), np.empty(0)
        self._frontier, self._probabilities = np.empty(0, np.int64), np.empty((0, 0))
        self._tokens, self._labels = np.empty((2, 0, 0), np.int64)
        self._lay_out(0, _CAPACITY)
        self._held: tuple[Any, ...] = ()  # what the layout points to
        self._sources: Sequence[CompiledSource | None] = ()
        self._written: list[tuple[Any, ...]] = [()] * _MAX_SOURCES

    def begin(
        self,
        nodes: Nodes,
        roots: IntArray,
        emittable: Emittable,
        correction: Correction | None,
        rules: FixedRules | PricedRules,
    ) -> int:
        """Start with the nodes `roots`; return below how many of them something could be emitted.

        `correction` None: build the trees on the probabilities as offered.
        """
        layout, count = self._layout, len(roots)
        layout.layers, layout.first, layout.rows = 0, 0, 0
        if count > layout.capacity:
            self._lay_out(layout.width, 2 * count)
        self._frontier[:count], layout.rows = roots, count
        self._held = emittable, correction, rules
        layout.groups, layout.keys, layout.remaining = map(
            address, (emittable.groups, emittable.keys, emittable.remaining)
        )
        layout.key_count = len(emittable.keys)
        layout.bins = None if correction is None else correction.bins.layout
        if correction is not None:
            layout.sampled, layout.limit = address(correction.sampled), correction.limit
        if isinstance(rules, FixedRules):
            self._use_fixed(rules, nodes.trees)
        else:
            self._use_priced(rules)
        rows: int = self._begin(self._pointer, nodes.layout)
        return rows

    def _use_fixed(self, rules: FixedRules, trees: int) -> None:
        layout = self._layout
        if len(self._sums) < trees:
            self._sums = np.empty(2 * trees)
            layout.sums = address(self._sums)
        self._sums[:trees] = 0.0
        layout.priced, layout.nodes, layout.threshold = 0, rules.nodes, rules.threshold

    def _use_priced(self, rules: PricedRules) -> None:
        layout = self._layout
        if len(self._row_prices) <= rules.node_limit:
            self._row_prices = np.empty(rules.node_limit + 1)
            layout.row_prices = address(self._row_prices)
        layout.priced, layout.prices_known, layout.nodes, layout.node_limit = 1, 0, rules.nodes, rules.node_limit
        layout.price, layout.rows_before, layout.entries = rules.price, rules.rows, rules.entries
        layout.min_gain, layout.drift, layout.entry_ms = rules.min_gain, rules.drift, rules.entry_ms
        layout.sizes, layout.points, layout.points_count = address(rules.sizes), address(rules.points), len(rules.sizes)
        layout.best_child, layout.depth_classes = address(rules.best_child), len(rules.best_child)
        layout.best_child_weight, layout.best_child_recovery = rules.best_child_weight, rules.best_child_recovery
        layout.layer_ms = address(rules.layer_ms)

    def use(self, sources: Sequence[CompiledSource | None], label: int) -> None:
        """Take the candidates of these sources; None: `write` brings them. One alone is of source `label`."""
        self._layout.source_count, self._layout.label = len(sources), label
        for index, source in enumerate(sources):
            slot = self._slots[index]
            slot.offer = NO_FUNCTION if source is None else source.function
            slot.labels = None
            if source is not None:
                slot.context, slot.width = source.context, source.width
        self._sources = sources

    def write(self, index: int, tokens: IntArray, probabilities: FloatArray, labels: IntArray | None) -> None:
        """Pass a source's candidates [frontier, width] to the compiled code, which reads them while the layer grows.

        `labels` [frontier, width] say which source each is of, if it is the only one that is used; None: one label.
        """
        slot = self._slots[index]
        tokens, probabilities = np.ascontiguousarray(tokens, np.int64), np.ascontiguousarray(probabilities, np.float64)
        labels = None if labels is None else np.ascontiguousarray(labels, np.int64)
        self._written[index] = tokens, probabilities, labels
        slot.labels = None if labels is None else address(labels)
        slot.tokens, slot.probabilities, slot.width = address(tokens), address(probabilities), tokens.shape[1]

    @property
    def frontier(self) -> IntArray:
        """The nodes that the next layer expands; a copy."""
        first = self._layout.first
        return self._frontier[first : first + self._layout.rows].copy()  # the memory may be replaced while it grows

    def grow(self, nodes: Nodes, layers: int) -> int:
        """Grow by up to `layers` layers; return the number of nodes to expand next."""
        layout = self._layout
        width = sum(self._slots[index].width for index in range(layout.source_count))
        if width > layout.width or (not layout.layers and width < layout.width):
            self._lay_out(width, layout.capacity)
        end = layout.layers + layers
        while (rows := self._grow(self._pointer, nodes.layout, end - layout.layers)) == _FULL:
            nodes.resize(nodes.laid_out)
            nodes.reserve(nodes.size + layout.rows * layout.width)
            self._lay_out(layout.width, max(layout.capacity, 2 * (layout.first + layout.rows * (1 + layout.width))))
        nodes.resize(nodes.laid_out)
        return int(rows)

    def layer_rows(self) -> list[int]:
        """Return how many nodes each layer has expanded."""
        rows: list[int] = self._layer_rows[: self._layout.layers].tolist()
        return rows

    def offered(self) -> tuple[IntArray, IntArray, FloatArray, IntArray]:
        """Return the nodes that were expanded [n], and what was offered there: tokens, probabilities, sources [n, k].

        They are views, which the next step overwrites.
        """
        n = self._layout.first
        return self._frontier[:n], self._tokens[:n], self._probabilities[:n], self._labels[:n]

    def learn(
        self, nodes: Nodes, bins: Bins, sampled: BoolArray, drawn: tuple[IntArray, IntArray, IntArray], decay: Decay
    ) -> None:
        """Count what was offered in this step as accepted or not, then decay the counts.

        `drawn` are the first three arguments of `TreeKernels.drawn_at`: the nodes of `nodes` that were verified, those
        of them that were visited, and the tokens drawn there.
        """
        kept, visited, tokens = drawn
        at = (address(kept), address(visited), address(tokens), len(visited))
        self._learn(self._pointer, bins.layout, address(sampled), nodes.layout, *at, decay.weight, decay.prior)

    def cut(self, nodes: Nodes, target: Nodes) -> IntArray:
        """Copy the nodes that are worth their rows to `target`, which has memory for all; return which they are."""
        kept = np.empty(nodes.size, np.int64)
        size = self._cut(self._pointer, nodes.layout, target.layout, address(kept))
        assert size >= 0, "a kept node lost its parent"
        target.resize(size)
        return kept[:size]

    def _lay_out(self, width: int, capacity: int) -> None:
        """Let up to `capacity` nodes have up to `width` candidates each; what was offered before stays."""
        layout, done = self._layout, self._layout.first
        held = (self._frontier, self._tokens, self._probabilities, self._labels)
        self._frontier = np.empty(capacity, np.int64)
        self._tokens, self._labels = np.zeros((2, capacity, width), np.int64)
        self._probabilities = np.zeros((capacity, width))
        self._frontier[: done + layout.rows] = held[0][: done + layout.rows]
        for old, new in zip(held[1:], (self._tokens, self._probabilities, self._labels), strict=True):
            kept = min(width, old.shape[1])
            new[:done, :kept] = old[:done, :kept]
        layout.capacity, layout.width = capacity, width
        layout.frontier, layout.tokens = address(self._frontier), address(self._tokens)
        layout.probabilities, layout.sources = address(self._probabilities), address(self._labels)


@cache
def growth_library() -> ctypes.CDLL | None:
    """Return the library compiled from growth.c; None without a C compiler."""
    return library(Path(__file__).with_name("growth.c"), *EXACT)


def bigram_source(tokens: IntArray, probabilities: FloatArray) -> BigramSource | None:
    """Return a source of `tokens` [vocabulary, width] by the token above them; None without a C compiler."""
    function = offer_function("offer_bigrams")
    return BigramSource(function, tokens, probabilities) if function else None


@cache
def offer_function(name: str) -> int:
    """Return the address of an `offer_t` of growth.c; 0 without a C compiler."""
    compiled = growth_library()
    return 0 if compiled is None else ctypes.cast(getattr(compiled, name), ctypes.c_void_p).value or 0
