"""A target and drafters that compute nothing: what is left of a step is the host's work."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from functools import partial
from time import thread_time
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from worker.engine.host.growth import bigram_source
from worker.engine.host.sources import CompiledSource
from worker.engine.paged.attention import PagedAttentionPlan, paged_plan
from worker.engine.paged.cuda_graphs import Captured
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import PagedRows
from worker.engine.paged.shape_buckets import BucketedForward, Outputs
from worker.engine.segments import IntArray, KvMove, Segment
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_tree import Candidates, Forest

VOCABULARY = 64  # few, because the argmax of logits is the device's work
BLOCK = 64  # KV entries of a block
STEP_MS = {1: 24.7, 64: 27.5, 128: 31.7, 256: 44.0}  # of the device, by rows

# Drafts and draws, as distances to the token before: the target draws the first candidate 6 times of 10.
_CANDIDATES, _PROBABILITIES = np.array([1, 2]), np.array([0.6, 0.2])
_DISTANCES = np.random.default_rng(0).choice([1, 2, 3], 997, p=[0.6, 0.2, 0.2])

T = TypeVar("T")


class NullTarget:
    """A paged language model whose forward computes nothing: it draws a known token at each row."""

    def __init__(self, slots: int, capacity: int, tokens: int) -> None:
        """Allocate slots of `capacity` KV entries of the smallest size, and `tokens` entries for all together."""
        self._kv = PagedKv(
            1, slots, 1, capacity, 1, torch.float32, torch.device("cpu"), block_size=BLOCK, tokens=tokens
        )
        self._rows: PagedRows | None = None  # of the last forward that was captured
        self._buckets = BucketedForward(self._run, self._kv, self._capture)
        self._costs = CostModel(STEP_MS)
        self._distances = torch.from_numpy(_DISTANCES)
        self.now_s = 0.0  # of the device's clock
        self.own_s = 0.0  # CPU time of the forward itself, which a device would spend, and of measuring it
        self.clock_s = min(timeit.repeat(thread_time, number=200, repeat=5)) / 200

    def clock(self) -> float:
        """Return the seconds that the device has worked."""
        return self.now_s

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Lay out the rows as a GPU's forward does, and return their logits."""
        shape = self._buckets.shape_for(segments)
        if shape is not None:
            return self._buckets.forward(segments, shape)[0]
        plan = paged_plan(segments, self._kv)
        return self._run(plan.rows, plan)[0]

    def _capture(self, work: Callable[[], T]) -> Captured[T]:
        """Capture a forward: its replays, like those of a CUDA graph, build no views of the rows."""
        work()
        assert self._rows is not None
        return Captured(partial(self._drawn, self._rows))  # type: ignore[arg-type]  # outputs, as those of `work`

    def _run(self, rows: PagedRows, _: PagedAttentionPlan) -> Outputs:
        self._rows = rows
        return self._drawn(rows)

    def _drawn(self, rows: PagedRows) -> Outputs:
        started = thread_time()
        ids, positions = rows.ids[rows.kept], rows.positions[rows.kept]
        drawn = (ids + self._distances[positions % len(self._distances)]) % VOCABULARY
        logits = torch.zeros(len(drawn), VOCABULARY).scatter_(1, drawn.unsqueeze(1), 1.0)
        count = rows.shape.rows
        self.now_s += float(self._costs.step_ms(np.array([count]), np.array([0.0]))[0]) / 1e3
        self.own_s += thread_time() - started + self.clock_s
        return logits, None

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move the KV entries of accepted paths."""
        self._kv.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Share a prefix."""
        self._kv.copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Free the blocks of a slot beyond `length` entries."""
        self._kv.truncate(slot, length)

    def clear(self) -> None:
        """Free all blocks."""
        for slot in range(self._kv.slots):
            self._kv.truncate(slot, 0)


class NullDrafter:
    """A drafter that computes nothing: two candidates below each node."""

    name = "null"
    forward_free = None

    def expand(self, forest: Forest, frontier: IntArray) -> Candidates:
        """Offer the two tokens that the target draws most often."""
        tokens = (forest.token[frontier, None] + _CANDIDATES) % VOCABULARY
        return Candidates(tokens, np.broadcast_to(_PROBABILITIES, tokens.shape))

    def num_uncached_tokens(self, sequence: EngineSequence) -> int:
        """Return 0: it reads nothing."""
        return 0

    def commit(self, forest: Forest, tree: int, path: IntArray, emitted: list[int]) -> None:
        """Learn nothing."""

    def drop(self, sequence: EngineSequence) -> None:
        """Forget nothing."""


class CompiledNullDrafter(NullDrafter):
    """The same, whose candidates compiled code finds: the trees of a step grow in one call."""

    def __init__(self) -> None:
        tokens = (np.arange(VOCABULARY)[:, None] + _CANDIDATES) % VOCABULARY
        self._source = bigram_source(tokens, np.broadcast_to(_PROBABILITIES, tokens.shape))

    def source(self, forest: Forest, roots: IntArray) -> CompiledSource:
        """Return the table of candidates."""
        assert self._source is not None, "there is no C compiler"
        return self._source
