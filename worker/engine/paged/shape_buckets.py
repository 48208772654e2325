"""Shape buckets: forwards of a few fixed shapes are captured once and replayed. Larger steps run without padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worker.engine.paged.attention import PagedAttentionPlan, reserve
from worker.engine.paged.cuda_graphs import GraphCapture, graph_capture
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import LISTED, PagedRows, Shape, fits_bucket, laid_out, part_limit, total_parts
from worker.engine.paged.work import max_parts
from worker.engine.segments import Segment

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows
Outputs = tuple[Tensor, Tensor | None]  # logits [kept, vocab], and other outputs per row: [rows, …] or [kept, …]
Run = Callable[[PagedRows, PagedAttentionPlan], Outputs]


class BucketedForward:
    """A model's forward in a few shapes: for each bucket of rows, one without draft trees and one with."""

    def __init__(self, run: Run, kv: PagedKv, capture: GraphCapture | None = None) -> None:
        """Run the rows with `run`; `capture` captures a forward; None: the device's default."""
        self._run, self._kv, self._capture = run, kv, capture or graph_capture(kv.keys.device)
        self._replays: dict[Shape, Callable[[], Outputs]] = {}
        largest = max(shape.size for shape in self.shapes)
        self._flat = torch.zeros(largest, dtype=torch.int64, device=kv.keys.device)  # input buffer of every capture

    @property
    def shapes(self) -> list[Shape]:
        """All shapes, the largest first: later captures reuse its memory."""
        return [self._shape(rows, listed) for rows in reversed(BUCKETS) for listed in (LISTED, 0)]

    def shape_for(self, segments: Sequence[Segment]) -> Shape | None:
        """Return the smallest shape that fits the rows; None if there are too many, or too many listed entries."""
        rows = sum(len(s.ids) for s in segments)
        bucket = next((bucket for bucket in BUCKETS if bucket >= rows), None)
        if bucket is None:
            return None
        listed = next((listed for listed in (0, LISTED) if fits_bucket(segments, listed)), None)
        if listed is None:
            return None
        shape = self._shape(bucket, listed)
        return shape if total_parts(segments, listed) + bucket - rows <= shape.parts else None

    def prepare(self) -> None:
        """Capture every shape now, so that no request waits for it."""
        for shape in self.shapes:
            self._replay([], shape)

    def forward(self, segments: Sequence[Segment], shape: Shape) -> Outputs:
        """Run the rows in the shape; return logits [kept, vocab] and the other outputs of the rows."""
        reserve(segments, self._kv)
        logits, other = self._replay(segments, shape)
        rows, kept = sum(len(s.ids) for s in segments), sum(len(s.keep) for s in segments)
        # Copies: the next replay overwrites the outputs of a capture.
        return logits[:kept].clone(), None if other is None else other[:rows].clone()

    def _replay(self, segments: Sequence[Segment], shape: Shape) -> Outputs:
        self._kv.sync_tables()
        flat = torch.from_numpy(laid_out(segments, self._kv, shape))
        self._flat[: len(flat)].copy_(flat)  # from pageable memory: it has read it when it returns, so it may be freed
        if shape not in self._replays:
            self._replays[shape] = self._capture(lambda: self._once(shape))
        return self._replays[shape]()

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
