"""Decide whether a step may speculate: bound what speculation can lose, even if the cost model is wrong.

It is a token bucket per drafting strategy and load class. A step adds the tokens that it wrote more than plain decoding
would have in the same time, or takes away those it wrote less; every step refills a small allowance. An empty bucket
blocks the strategy until it holds `REOPEN_TOKENS` again, so long losses stay below `REFILL_RATE` of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from worker.engine.speculation.constants import (
    BUCKET_TOKENS,
    BUCKET_TOKENS_PER_SEQUENCE,
    GAIN_WEIGHT,
    REFILL_RATE,
    REOPEN_TOKENS,
    STEP_OUTLIER,
    TRIAL_BATCH,
)
from worker.engine.speculation.cost_model import load_class
from worker.engine.speculation.running_mean import RunningMean

_mean = partial(RunningMean, GAIN_WEIGHT)
_MEANS = ("throughput", "speedup", "gain", "plain_steps")  # of a load class


@dataclass(slots=True)
class _LoadClass:
    """The bucket of one load class, and running means of its steps."""

    tokens: float  # in the bucket
    blocked: bool = False
    throughput: RunningMean = field(default_factory=_mean)  # tokens per ms, of all steps
    speedup: RunningMean = field(default_factory=partial(_mean, 1.0))  # over plain decoding, of all steps
    gain: RunningMean = field(default_factory=_mean)  # over plain decoding, as a fraction of it, of speculating steps
    plain_steps: RunningMean = field(default_factory=partial(_mean, 1.0))  # time of a speculating step, in plain steps

    def refill(self, batch_size: int, tokens: int, earned: float = 0.0) -> None:
        """Add what a step earned and its allowance, up to the capacity."""
        capacity = max(BUCKET_TOKENS, BUCKET_TOKENS_PER_SEQUENCE * batch_size)
        self.tokens = min(self.tokens + earned + REFILL_RATE * tokens, capacity)

    def update(self) -> None:
        """Block on an empty bucket; unblock with hysteresis."""
        self.blocked = self.tokens < (REOPEN_TOKENS if self.blocked else 0.0)

    def steps_taken(self, step_ms: float, plain_ms: float, speculated: bool) -> float:
        """Return the duration of a step in plain steps, clipped to `STEP_OUTLIER` times the usual duration.

        So a pause of the machine is not booked as a loss of the drafts. Drafts that are slow in every step raise the
        usual duration, and their loss is booked in full.
        """
        usual = self.plain_steps.value if speculated else 1.0
        steps = min(step_ms / plain_ms, STEP_OUTLIER * max(1.0, usual))
        if speculated:
            self.plain_steps.add(steps)
        return steps


class RegretGuard:
    """Token buckets of one drafting strategy, by load class."""

    def __init__(self) -> None:
        self._classes: dict[int, _LoadClass] = {}

    def _class(self, batch_size: int) -> _LoadClass:
        """Return the bucket of a load, a new one if there is none.

        Rows cost more with more sequences. So drafts that lost at a smaller load start with few tokens. A load above
        `TRIAL_BATCH` starts with none unless drafts have gained at a smaller one: it saves its allowance, then tries.
        """
        load = load_class(batch_size)
        if load not in self._classes:
            tried = [known for known in self._classes if known < load and self._classes[known].gain.samples]
            gain = self._classes[max(tried)].gain.value if tried else 0.0
            if load > load_class(TRIAL_BATCH) and gain <= 0.0:
                self._classes[load] = _LoadClass(0.0, blocked=True)
            else:
                self._classes[load] = _LoadClass(BUCKET_TOKENS if gain >= 0.0 else REOPEN_TOKENS)
        return self._classes[load]

    def blocked(self, batch_size: int) -> bool:
        """Return whether the next step, of `batch_size` decoding sequences, must not use this strategy."""
        return self._class(batch_size).blocked

    def time_price(self, batch_size: int, plain_ms: float) -> float:
        """Return the opportunity cost of time, in tokens per ms: plain throughput, or the recent one if it is higher.

        Batch sizes of a load class share the speed-up, so it is applied to the plain throughput of `batch_size`.
        """
        return batch_size / plain_ms * max(self._class(batch_size).speedup.value, 1.0)

    def throughput(self, batch_size: int) -> float:
        """Return the tokens per ms of recent steps, with drafts or not; 0 before the first."""
        return self._class(batch_size).throughput.value

    def tokens(self, batch_size: int) -> float:
        """Return the tokens in the bucket: what may be lost on trying drafts."""
        return self._class(batch_size).tokens

    def gain(self, batch_size: int) -> float:
        """Return the mean gain of recent speculating steps over plain ones, as a fraction of a plain step."""
        return self._class(batch_size).gain.value

    def observe(self, batch_size: int, tokens: int, step_ms: float, plain_ms: float, *, speculated: bool) -> None:
        """Account for a step that wrote `tokens` tokens in `step_ms`, where plain decoding takes `plain_ms`.

        `speculated`: it spent more than a lookup on drafts, whether or not any was verified.
        """
        load = self._class(batch_size)
        steps = load.steps_taken(step_ms, plain_ms, speculated)
        load.throughput.add(tokens / (steps * plain_ms))
        load.speedup.add(tokens / (batch_size * steps))
        earned = tokens - batch_size * steps  # 0 for a plain step
        load.refill(batch_size, tokens, earned)
        if speculated:
            load.gain.add(earned / batch_size)
            if load.gain.value >= 0.0:
                load.tokens = max(load.tokens, 0.0)
        load.update()

    def observe_idle(self, batch_size: int, tokens: int) -> None:
        """Refill the allowance for a step that used another strategy."""
        load = self._class(batch_size)
        load.refill(batch_size, tokens)
        load.update()

    def as_json(self) -> dict[str, Any]:
        """Return the buckets, by the largest batch of each load class."""
        return {
            str(2**key): {
                "credit_tokens": round(load.tokens, 2),
                "overdrawn": load.blocked,
                "tokens_per_s": round(load.throughput.value * 1e3, 2),
                "steps": load.throughput.samples,
            }
            for key, load in sorted(self._classes.items())
        }

    def record(self) -> dict[str, Any]:
        """Return the buckets and means as JSON, for `restore`, by load class."""
        return {
            str(key): {"tokens": round(load.tokens, 4), "blocked": load.blocked}
            | {name: getattr(load, name).record() for name in _MEANS}
            for key, load in sorted(self._classes.items())
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from what `record` returned."""
        for key, stored in record.items():
            load = self._classes.setdefault(int(key), _LoadClass(float(stored["tokens"]), bool(stored["blocked"])))
            for name in _MEANS:
                getattr(load, name).restore(stored[name])
