"""The workers page: their devices, models, load, and the decisions of their steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nicegui import ui

from jobs.api.auth.caller import Caller
from jobs.dashboard import format
from jobs.dashboard.layout import box, frame, heading
from jobs.dashboard.session import PageContext
from jobs.dashboard.stats_view import table
from storage import queries
from storage.queries import WorkerView
from storage.records import HEARTBEAT_TIMEOUT_S

_REFRESH_S: Final = 3.0
_AGO_S: Final = 30.0  # interval at which the page updates its relative times
_SHOWN: Final = 40


async def build(context: PageContext, caller: Caller) -> None:
    """Build the page; it is redrawn only when a worker changed or its relative times did."""
    with frame("Workers", context):
        heading("Workers", 1)
        shown = ui.element("div").classes("stack")
        last: list[object] = []

        async def refresh() -> None:
            workers = (await context.read(queries.workers))[:_SHOWN]
            facts = [(w.id, w.load, w.stopped_at, _alive(w)) for w in workers]
            current = [int(time.time() // _AGO_S), *facts]
            if current == last:
                return
            last[:] = current
            shown.clear()
            with shown:
                _show(workers)

        await refresh()
        ui.timer(_REFRESH_S, refresh, immediate=False)


def _show(workers: Sequence[WorkerView]) -> None:
    alive = [worker for worker in workers if _alive(worker)]
    if not alive:
        ui.label("No worker is running. Start one with `basic up` or `basic worker`.").classes("dim")
    for worker in alive:
        _card(worker)
    gone = [worker for worker in workers if not _alive(worker)]
    if gone:
        with box():
            heading("Earlier workers")
            with ui.element("div").classes("wide"):
                table(
                    ("Worker", "Seen"),
                    [(f"{w.hostname}, process {w.pid}: {w.target}", format.ago(w.last_seen_at)) for w in gone],
                )


def _alive(worker: WorkerView) -> bool:
    return worker.stopped_at is None and worker.last_seen_at > time.time() - HEARTBEAT_TIMEOUT_S


def _card(worker: WorkerView) -> None:
    load = worker.load or {}
    with box():
        heading(f"{worker.target} on {worker.hostname}")
        draft = f"drafts by {worker.draft}" if worker.draft else "no draft model"
        devices = ", ".join(map(str, worker.devices))
        context = f"context of {worker.context_tokens:,d} tokens"
        numerics = f" · numerics {worker.numerics}" if worker.numerics else ""
        ui.label(f"{devices} · {draft} · {context} · started {format.ago(worker.started_at)}{numerics}").classes(
            "dim small"
        )
        with ui.element("dl").classes("figures"):
            for name, value in _figures(load):
                with ui.element("div"):
                    with ui.element("dt"):
                        ui.label(name)
                    with ui.element("dd"):
                        ui.label(value)
        _kv_bar(load)
        failures = load.get("capture_failures") or {}
        if failures:
            shapes, reason = ", ".join(failures), next(iter(failures.values()))
            ui.label(f"Slower without a CUDA graph: forwards of {shapes} ({reason})").classes("status-warning small")
        steps = load.get("steps") or {}
        if steps:
            total = sum(steps.values())
            ranked = sorted(steps.items(), key=lambda item: -item[1])
            with ui.element("div").classes("wide"):
                table(("Decision", "Steps", "Share"), [(n, f"{c:,d}", format.percent(c / total)) for n, c in ranked])


def _figures(load: Mapping[str, Any]) -> list[tuple[str, str]]:
    steps = sum((load.get("steps") or {}).values())
    milliseconds = load.get("step_ms") or 0.0
    return [
        ("Sequences now", f"{load.get('sequences', 0):,d} of {load.get('max_sequences', 0):,d}"),
        ("Waiting sequences", f"{load.get('waiting_sequences', 0):,d}"),
        ("Mean batch", format.number(load["batch_sequences"] / steps if steps else None)),
        ("Tokens/s while decoding", format.number(load["tokens"] / milliseconds * 1e3 if milliseconds else None)),
        ("Accepted per step", format.number(load["accepted_tokens"] / load["batch_sequences"] if steps else None, 2)),
        ("Preemptions", f"{load.get('preemptions', 0):,d}, {load.get('recomputed_tokens', 0):,d} tokens recomputed"),
        ("Energy", format.number(load.get("joules") or None, 0, " J")),
    ]


def _kv_bar(load: Mapping[str, Any]) -> None:
    used, capacity = load.get("kv_tokens", 0), load.get("kv_capacity_tokens", 0)
    if capacity:
        ui.label(f"KV memory: {used:,d} of {capacity:,d} tokens").classes("small")
        ui.element("progress").props(f'max="{capacity}" value="{used}" aria-label="KV memory in use"')
