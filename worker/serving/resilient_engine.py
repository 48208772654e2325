"""Recovery: an engine that outlives its steps. A step that fails is tried again with half as many sequences.

What fails may be the size of the batch or one of its sequences, and nobody can tell which from the exception. So a
fresh engine gets half of them, first those that have not emitted since they came. Once all it holds have emitted, twice
as many may come. A sequence that fails alone is given up; everybody else goes on.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from worker.engine.engine import Engine
from worker.engine.errors import NanLogits, RankLost
from worker.engine.sampling.penalties import TokenCounts
from worker.engine.sequence import Sequence
from worker.engine.stats import StepResult

log = logging.getLogger(__name__)


def _guilty(error: Exception, marks: Collection[Sequence]) -> Collection[Sequence]:
    """Return whose failure it was, if the error names some of several, or the only one."""
    named = error.sequences if isinstance(error, NanLogits) else ()
    if len(named) == len(marks) > 1:  # that may lie in what they share
        return ()
    for sequence in named:
        sequence.failure = f"decoding failed on this request: {error}"
    return named


@dataclass(slots=True)
class _Mark:
    """Where a sequence stood before the step."""

    length: int
    steps: int


class ResilientEngine:
    """An engine whose KV is rebuilt from the sequences' ids when a step has failed."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        """Start with a fresh engine; `make_engine` also replaces one whose step failed."""
        self._make_engine = make_engine
        self._engine = make_engine()
        self._held: dict[Sequence, bool] = {}  # in the engine; whether it has emitted since it came
        self._waiting: deque[Sequence] = deque()  # not in the engine: they might be what failed
        self._limit: int | None = None  # sequences that the engine may hold; None: as many as it likes
        self._calm = 0  # steps in a row that went well
        self._failures = 0  # failed steps since a sequence was last given up

    @property
    def free_capacity(self) -> int:
        """Sequences that can be added and admitted at once; none before everybody is back after a failure."""
        return max(0, self._engine.free_capacity - len(self._waiting)) if self._limit is None else 0

    @property
    def busy(self) -> bool:
        """True while some sequence has not ended."""
        return bool(self._waiting) or self._engine.busy

    @property
    def learned(self) -> dict[str, Any]:
        """What the engine has learned about drafts since it was made, as JSON."""
        return self._engine.learned

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, fresh or resumed."""
        self._waiting.append(sequence)

    def cancel(self, keys: set[Hashable]) -> None:
        """End sequences by key, without another token."""
        for sequence in self._waiting:
            sequence.cancelled |= sequence.key in keys
        self._engine.cancel(keys)
        self._forget_finished()

    def step(
        self, only: Collection[Hashable] | None = None, *, plain: bool = False
    ) -> tuple[list[StepResult], list[Sequence]]:
        """Run one step, with the engine's arguments.

        Return what each emitting sequence got, and those that are given up.
        """
        unfit = self._admit()
        marks = {s: _Mark(len(s.ids), s.steps) for s in self._held}
        try:
            results = self._engine.step(only, plain=plain)
        except (RankLost, torch.AcceleratorError):  # no engine can run on what is left of the replica or its device
            raise
        except Exception as error:  # the one place where any failure of a step is survived
            about = {"action": "step_failed", "sequences": [s.key for s in marks]}  # (job, request, choice) of each
            log.exception("A step of %d sequences failed", len(marks), extra=about)
            return [], [*unfit, *self._start_over(marks, _guilty(error, marks))]
        for result in results:
            self._held[result.sequence] = True
        self._forget_finished()
        self._widen()
        return results, unfit

    def _admit(self) -> list[Sequence]:
        """Hand waiting sequences to the engine as far as it may hold them; return those that it does not take."""
        unfit = []
        while self._waiting and (self._limit is None or len(self._held) < self._limit):
            sequence = self._waiting.popleft()
            try:
                self._engine.add(sequence)
            except Exception as error:  # such as a text that another worker, with a longer context, has begun
                log.exception("A sequence can't be decoded", extra={"action": "unfit", "sequences": [sequence.key]})
                sequence.failure = f"this worker can't decode the request: {error}"
                unfit.append(sequence)
            else:
                self._held[sequence] = False
        return unfit

    def _start_over(self, marks: dict[Sequence, _Mark], guilty: Collection[Sequence]) -> list[Sequence]:
        """Take everybody back to before the step; return those who are known to be guilty, or failed alone."""
        alone = self._limit == 1 or bool(guilty)
        given_up = list(guilty or marks) if alone else []
        for sequence, mark in marks.items():
            del sequence.ids[mark.length :]
            sequence.steps, sequence.finish_reason = mark.steps, None
            sequence.slot, sequence.cached = -1, 0
            sequence.history = TokenCounts()  # it may have counted what is taken back
        # The sort is stable: those who have not shown that they can emit come first, so that halving finds the one.
        suspects = [s for s in sorted(marks, key=lambda s: self._held[s]) if s not in given_up]
        self._waiting.extendleft(reversed(suspects))
        self._limit = self._limit if guilty else max(1, len(marks) // 2)
        self._failures = 0 if alone else self._failures + 1
        self._calm = 0
        self._held = {}
        self._engine = self._make_engine()
        return given_up

    def _widen(self) -> None:
        """Let twice as many come, later after every failure, lest a batch that is too large be tried for ever."""
        self._calm += 1
        if self._limit is None or self._calm < self._failures or not all(self._held.values()):
            return
        self._limit, self._calm = 2 * self._limit, 0
        if self._limit >= len(self._held) + len(self._waiting):
            self._limit = None

    def _forget_finished(self) -> None:
        self._waiting = deque(s for s in self._waiting if not s.finished)
        self._held = {s: emitted for s, emitted in self._held.items() if not s.finished}
