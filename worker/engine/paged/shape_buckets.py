"""Forwards over paged KV. Those of a few fixed shapes, the buckets, are captured once and replayed; larger steps run
without padding.

A model that ranks share runs the same steps on each: the first lays them out, the others follow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from worker.engine.options import MAX_STEP_NODES
from worker.engine.paged.attention import PagedAttentionPlan, reserve
from worker.engine.paged.cuda_graphs import CaptureFailed, GraphCapture, graph_capture
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import (
    LISTED,
    PagedRows,
    Shape,
    bucket_needs,
    exact_shape,
    laid_out,
    on_device,
    part_limit,
)
from worker.engine.paged.step import PagedStep
from worker.engine.paged.work import max_parts
from worker.engine.segments import Segment, Segments

BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, *range(32, 513, 32), *range(576, 1025, 64))  # rows
GRAPH_BYTES = 512 << 20  # of memory for captured forwards, without their activations, which all share
Outputs = tuple[Tensor, Tensor | None]  # logits [kept, vocab], and other outputs per row: [rows, …] or [kept, …]
Run = Callable[[PagedRows, PagedAttentionPlan], Outputs]

log = logging.getLogger(__name__)

_NO_GRAPH = {"action": "no_graph"}


class BucketedForward:
    """A model's forward in a few shapes: for each bucket of rows, one without draft trees and one with."""

    def __init__(self, run: Run, kv: PagedKv, capture: GraphCapture | None = None) -> None:
        """Run the rows with `run`; `capture` captures a forward; None: the device's default."""
        self._run, self._kv, self._capture = run, kv, capture or graph_capture(kv.keys.device)
        self._replays: dict[Shape, Callable[[], Outputs]] = {}
        self._left_bytes = GRAPH_BYTES
        self.on_step: Callable[[PagedStep], None] | None = None  # learns of each step before it runs
        self.capture_failures: dict[str, str] = {}  # reason, by name of the shape
        self.shapes = {listed: [self._shape(rows, listed) for rows in BUCKETS] for listed in (0, LISTED)}
        largest = max(shape.size for shapes in self.shapes.values() for shape in shapes)
        self._flat = torch.zeros(largest, dtype=torch.int64, device=kv.keys.device)  # input buffer of every capture

    def shape_for(self, segments: Sequence[Segment]) -> Shape | None:
        """Return the smallest shape that fits the rows and is captured or may be; None if there is none."""
        packed = Segments.of(segments)
        rows, needs = packed.num_rows, bucket_needs(packed)
        if needs.listed is None:
            return None
        parts = needs.parts - rows
        fitting = (s for s in self.shapes[needs.listed] if s.rows >= rows and s.parts - s.rows >= parts)
        return next((shape for shape in fitting if self._may_capture or shape in self._replays), None)

    @property
    def _may_capture(self) -> bool:
        """True while there is memory for another captured forward."""
        return self._left_bytes > 0

    def prepare(self) -> None:
        """Capture the shapes that full steps have, so that no request waits for it; others when they are first needed.

        Powers of two come first, so that a small memory leaves no gap; then the largest, whose memory later ones reuse.
        """
        for shape in sorted(self._expected(), key=lambda s: (s.rows & (s.rows - 1) > 0, -s.rows)):
            if self._may_capture:
                self._start(Segments.of([]), shape)

    def _expected(self) -> list[Shape]:
        """Return the shapes of steps with up to a row per slot, and up to the draft nodes of a step more."""
        limits = {0: self._kv.slots, LISTED: self._kv.slots + MAX_STEP_NODES}
        return [
            shape
            for listed, limit in limits.items()
            for shape in self.shapes[listed]
            if shape.rows <= _bucket_of(limit)
        ]

    def forward(self, segments: Sequence[Segment], shape: Shape | None) -> Outputs:
        """Run the rows in the shape of a bucket, or without padding (None).

        Return logits [kept, vocab] and the other outputs of the rows.
        """
        packed = Segments.of(segments)
        reserve(packed, self._kv)
        logits, other = self._start(packed, shape)
        if shape is None:
            return logits, other
        # Copies: the next replay overwrites the outputs of a capture.
        return logits[: len(packed.kept)].clone(), None if other is None else other[: packed.num_rows].clone()

    def follow(self, step: PagedStep) -> None:
        """Run the step of another rank on this rank's keys and values."""
        self._kv.follow(step.blocks, step.moves)
        self._run_step(step)

    def _start(self, segments: Segments, bucket: Shape | None) -> Outputs:
        """Lay out a step and run it."""
        shape = bucket or exact_shape(segments, self._kv)
        blocks, moves = self._kv.pop_blocks(), self._kv.pop_moves()
        step = PagedStep(shape, bucket is not None, laid_out(segments, self._kv, shape), blocks, moves)
        if self.on_step is not None:
            self.on_step(step)
        self._kv.show(blocks)
        return self._run_step(step)

    def _run_step(self, step: PagedStep) -> Outputs:
        if not step.in_bucket:
            rows = PagedRows(step.shape, on_device(step.flat, self._flat.device))
            return self._run(rows, PagedAttentionPlan(rows, self._kv))
        # A copy from pageable memory has read it when it returns, so it may be freed.
        self._flat[: len(step.flat)].copy_(torch.from_numpy(step.flat))
        replay = self._replays.get(step.shape)
        if replay is None:
            replay = self._replays[step.shape] = self._captured(step.shape)
        return replay()

    def _captured(self, shape: Shape) -> Callable[[], Outputs]:
        """Return the captured forward of a shape; the forward itself, which is slower, if it can't be captured."""
        work = partial(self._once, shape)
        try:
            captured = self._capture(work)
        except CaptureFailed as failure:
            self._left_bytes = 0
            self.capture_failures[shape.name] = str(failure)
            log.warning("A forward of %s can't be captured and runs slower: %s", shape.name, failure, extra=_NO_GRAPH)
            return work
        self._left_bytes -= captured.bytes
        return captured.replay

    def _once(self, shape: Shape) -> Outputs:
        """Run the rows in the input buffer; this is what is captured."""
        rows = PagedRows(shape, self._flat)
        return self._run(rows, PagedAttentionPlan(rows, self._kv))

    def _shape(self, rows: int, listed: int) -> Shape:
        parts = min(max_parts(rows, self._kv.capacity + listed), max(rows, part_limit(self._kv)))
        return Shape(
            rows=rows,
            kept=rows,
            # Without trees every row is a run; with trees a slot is at most one run, and padding another.
            sequences=min(rows, self._kv.slots) + 1 if listed else rows,
            queries=rows if listed else 1,
            blocks=self._kv.tables.shape[1],
            listed=listed,
            causal=not listed,
            parts=parts,
            items=2 * parts,
            row_bounds=(0, rows),
        )


def _bucket_of(rows: int) -> int:
    """Return the smallest bucket that holds the rows; the largest if none does."""
    return next((bucket for bucket in BUCKETS if bucket >= rows), BUCKETS[-1])
