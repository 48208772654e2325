"""Buckets: forwards of a few fixed shapes, recorded once and replayed. Steps with more rows run as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.engine.paged.attention import PagedAttentionPlan, reserve
from worker.engine.paged.cuda_graphs import GraphCapture, graph_capture
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import LISTED, PagedRows, Shape, fits_bucket, laid_out
from worker.engine.segments import Segment

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows
Outputs = tuple[Tensor, Tensor | None]  # logits [kept, vocab], and what else there is of rows: [rows, …] or [kept, …]
Run = Callable[[PagedRows, PagedAttentionPlan], Outputs]  # takes rows and what they see


class BucketedForward:
    """A model's forward in a few shapes: for each number of rows one without draft trees and one with."""

    def __init__(self, run: Run, kv: PagedKv, record: GraphCapture | None = None) -> None:
        """Run the rows with `run`; `record` makes a recording of a forward, by default the device's own kind."""
        self._run, self._kv, self._record = run, kv, record or graph_capture(kv.keys.device)
        self._replays: dict[Shape, Callable[[], Outputs]] = {}
        largest = max(shape.size for shape in self.shapes)
        self._flat = torch.zeros(largest, dtype=torch.int64, device=kv.keys.device)  # every recording reads from here

    @property
    def shapes(self) -> list[Shape]:
        """Every shape there is, the largest first: what is recorded later finds room in its memory."""
        return [self._shape(rows, listed) for rows in reversed(BUCKETS) for listed in (LISTED, 0)]

    def shape_for(self, segments: Sequence[Segment]) -> Shape | None:
        """Return the smallest shape with room for the rows; None if they are too many or see too much."""
        rows = sum(len(s.ids) for s in segments)
        bucket = next((bucket for bucket in BUCKETS if bucket >= rows), None)
        if bucket is None:
            return None
        listed = next((listed for listed in (0, LISTED) if fits_bucket(segments, listed)), None)
        return None if listed is None else self._shape(bucket, listed)

    def prepare(self) -> None:
        """Capture every shape now, so that no request waits for it."""
        for shape in self.shapes:
            self._replay([], shape)

    def forward(self, segments: Sequence[Segment], shape: Shape) -> Outputs:
        """Run the rows in the shape; return logits [kept, vocab] and what else there is of the rows."""
        reserve(segments, self._kv)
        logits, more = self._replay(segments, shape)
        rows, kept = sum(len(s.ids) for s in segments), sum(len(s.keep) for s in segments)
        # Copies: the next replay writes over what a recording has returned.
        return logits[:kept].clone(), None if more is None else more[:rows].clone()

    def _replay(self, segments: Sequence[Segment], shape: Shape) -> Outputs:
        # From ordinary memory, so that the numbers are read before this returns.
        self._flat[: shape.size].copy_(torch.from_numpy(laid_out(segments, self._kv, shape)))
        if shape not in self._replays:
            self._replays[shape] = self._record(lambda: self._once(shape))
        return self._replays[shape]()

    def _once(self, shape: Shape) -> Outputs:
        """Run the rows that the buffer holds; what is recorded."""
        rows = PagedRows(shape, self._flat)
        return self._run(rows, PagedAttentionPlan(rows, self._kv))

    def _shape(self, rows: int, listed: int) -> Shape:
        return Shape(
            rows=rows,
            kept=rows,
            # Without trees every row is a run; with them a slot is one at most, and padding another.
            sequences=min(rows, self._kv.slots) + 1 if listed else rows,
            queries=rows if listed else 1,
            blocks=self._kv.tables.shape[1],
            listed=listed,
            causal=not listed,
        )
