"""Quantised weights and KV beside those of the checkpoint: time of a step, and distance of the next tokens.

All forms are in one process and take turns, so that a busy machine slows all of them. The distance is that of the
logits at each token of the texts: the divergence of Kullback and Leibler in nats, and how often the most likely token
is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor

from worker.engine.model.packed_model import PackedModel
from worker.engine.segments import chain

CONTEXT = 32  # tokens before the rows of a timed step


@dataclass(frozen=True, slots=True)
class FormTime:
    """The fastest step of a form with a number of rows, one of each sequence."""

    form: str
    rows: int
    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class FormDistance:
    """How far the next tokens of a form are from those of the checkpoint's weights, over all tokens of the texts."""

    form: str
    mib: float  # of weights in memory
    tokens: int
    loss: float  # negative log probability of the texts' own tokens, in nats a token
    divergence: float  # mean, in nats
    divergence_p99: float
    same_top: float  # share of tokens after which the most likely one is the same


def measure_steps(models: dict[str, PackedModel], rows: int, rounds: int, context: int = CONTEXT) -> list[FormTime]:
    """Return the fastest of a few steps of each form, with `context` tokens before each row."""
    step = [chain(slot, context, [7], keep_last=True) for slot in range(rows)]
    best = {form: (float("inf"), float("inf")) for form in models}
    for model in models.values():
        model.forward([chain(slot, 0, [1] * context, keep_last=True) for slot in range(rows)])
    for _ in range(rounds):
        for form, model in models.items():
            wall, cpu = perf_counter(), process_time()
            model.forward(step)
            best[form] = min(best[form][0], perf_counter() - wall), min(best[form][1], process_time() - cpu)
    return [FormTime(form, rows, round(wall * 1e3, 2), round(cpu * 1e3, 2)) for form, (wall, cpu) in best.items()]


def measure_distances(
    models: dict[str, PackedModel], mib: dict[str, float], texts: Sequence[list[int]]
) -> list[FormDistance]:
    """Return the distance of each form from the first one."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {form: [] for form in models}
    for ids in texts:
        exact: Tensor | None = None
        for form, model in models.items():
            rows = replace(chain(0, 0, ids, keep_last=True), keep=np.arange(len(ids)))
            logs = model.forward([rows]).float().log_softmax(-1)
            exact = logs if exact is None else exact
            losses = -logs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            divergences = (exact.exp() * (exact - logs)).sum(1)
            found[form].append((losses, divergences, exact.argmax(1) == logs.argmax(1)))
    return [_distance(form, mib[form], parts) for form, parts in found.items()]


def _distance(form: str, mib: float, parts: list[tuple[Tensor, Tensor, Tensor]]) -> FormDistance:
    losses, divergences, same = (torch.cat(column) for column in zip(*parts, strict=True))
    figures = (losses.mean(), divergences.mean(), divergences.quantile(0.99), same.float().mean())
    return FormDistance(form, mib, len(same), *(round(float(figure), 5) for figure in figures))
