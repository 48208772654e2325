"""From what a pilot has left in the database to the prediction of its job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from jobs.reports.pilot.estimate import Pilot
from jobs.reports.pilot.lengths import OpenRequest, PilotRequest, PilotText
from jobs.reports.pilot.step_times import MeasuredStep
from storage.pilots import PilotOutput, PilotRecord, PilotStep
from storage.queries import WorkerView

_MAX_PAUSE_MS: Final = 250.0  # between steps; in longer ones the worker had nothing to do
_SLOTS: Final = 64  # of a worker that has not reported its own


def pilot_of(record: PilotRecord, workers: Sequence[WorkerView]) -> Pilot:
    """Return the pilot as it is predicted from; `workers` are those that serve the model."""
    requests = _requests(record.outputs)
    prompt_tokens = {index: 0 if request.repeats else request.prompt_tokens for index, request in requests.items()}
    by_worker = groupby(record.steps, lambda step: step.worker_id)
    steps = [step for _, own in by_worker for step in _measured(own, prompt_tokens)]
    waiting = [OpenRequest(one.size, one.texts, one.max_tokens, one.repeats) for one in record.waiting]
    rows = sum(step.rows for step in record.steps)
    nodes = sum(step.tree_nodes for step in record.steps)
    power, _ = power_of(workers)
    return Pilot(
        requests=list(requests.values()),
        steps=steps,
        rest=waiting,
        slots=_slots(record, len(record.outputs), (workers[0].load or {}) if workers else {}),
        workers=max(1, len(workers)),
        rows_ms=_rows_ms(workers[0]) if workers else None,
        rows_per_sequence=1.0 + nodes / rows if rows else 1.0,
        power_w=power,
    )


def power_of(workers: Sequence[WorkerView]) -> tuple[float | None, str | None]:
    """Return the mean power of a worker in watts, and where it comes from: measured, configured, or unknown."""
    for source in ("measured", "configured"):
        watts = [(worker.load or {}).get(f"{source}_power_w") for worker in workers]
        known = [float(value) for value in watts if value]
        if known and len(known) == len(watts):
            return sum(known) / len(known), source
    return None, None


def _requests(outputs: Sequence[PilotOutput]) -> dict[int, PilotRequest]:
    found = {}
    for index, texts in groupby(outputs, lambda output: output.request_index):
        own = list(texts)
        found[index] = PilotRequest(
            size=own[0].size,
            prompt_tokens=sum(text.prompt_tokens for text in own if text.first_of_prompt),
            texts=tuple(PilotText(text.completion_tokens, text.finish_reason == "length") for text in own),
            repeats=own[0].repeats,
        )
    return found


def _measured(steps: Iterable[PilotStep], prompt_tokens: Mapping[int, int]) -> Iterator[MeasuredStep]:
    """Yield the steps of one worker, each with the time since the step before."""
    before_ms: int | None = None
    for step in steps:
        since_ms = step.step_ms if before_ms is None else float(step.ended_ms - before_ms)
        before_ms = step.ended_ms
        yield MeasuredStep(
            sequences=step.batch_sequences,
            ms=since_ms if since_ms < step.step_ms + _MAX_PAUSE_MS else step.step_ms,
            emitted=step.emitted_tokens / step.rows if step.rows else 0.0,
            prefilled_tokens=sum(prompt_tokens.get(index, 0) for index in set(step.first_tokens_of)),
            with_prefill=step.with_prefill or bool(step.first_tokens_of),
        )


def _slots(record: PilotRecord, texts: int, load: Mapping[str, Any]) -> int:
    """Return how many texts of the job a worker decodes at once: as many as in the pilot, if more of it waited."""
    largest = max((step.batch_sequences for step in record.steps), default=1)
    if texts > largest:
        return largest
    allowed = int(load.get("max_sequences") or _SLOTS) - int(load.get("reserved_sequences") or 0)
    kv_tokens, used = load.get("kv_capacity_tokens"), sum(o.prompt_tokens + o.completion_tokens for o in record.outputs)
    if kv_tokens and used:
        allowed = min(allowed, int(kv_tokens) * len(record.outputs) // used)
    return max(largest, allowed)


def _rows_ms(worker: WorkerView) -> dict[int, float]:
    calibrated = worker.calibration.get("step_ms_by_rows") or {}
    corrected = worker.calibration.get("correction_by_rows") or {}
    return {int(rows): float(ms) * float(corrected.get(rows, 1.0)) for rows, ms in calibrated.items()}
