"""An engine that survives failing steps: it retries with half as many sequences until the failing one is alone.

An exception does not tell whether the batch is too large or one sequence fails. So a fresh engine gets half of the
sequences, first those that have emitted nothing since they were added. Once all of them have emitted, the limit
doubles. A sequence that fails alone is given up; all others continue.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Hashable
from typing import Any

import torch

from worker.engine.engine import Engine
from worker.engine.errors import NanLogits, RankLost
from worker.engine.sequence import Sequence
from worker.engine.stats import StepBatch

log = logging.getLogger(__name__)


def _suspects_named_by(error: Exception, held: Collection[Sequence]) -> Collection[Sequence]:
    """Return the sequences that the error names; none if it names all of several: then the cause may be shared."""
    named = error.sequences if isinstance(error, NanLogits) else ()
    if len(named) == len(held) > 1:
        return ()
    for sequence in named:
        sequence.failure = f"decoding failed on this request: {error}"
    return named


class ResilientEngine:
    """An engine that is rebuilt from the token ids of its sequences after a failed step."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        """Create an engine with `make_engine`, which is called again after each failed step."""
        self._make_engine = make_engine
        self._engine = make_engine()
        self._held: list[Sequence] = []  # in the engine
        self._silent: set[Sequence] = set()  # those of them that have emitted nothing since they were added
        self._waiting: deque[Sequence] = deque()  # not in the engine: new, or suspected of the failure
        self._limit: int | None = None  # max sequences in the engine; None: no limit
        self._successes = 0  # successful steps in a row
        self._num_failures = 0  # failed steps since a sequence was given up

    @property
    def free_capacity(self) -> int:
        """Sequences that can be added and admitted at once; 0 until all are back after a failure."""
        return max(0, self._engine.free_capacity - len(self._waiting)) if self._limit is None else 0

    @property
    def busy(self) -> bool:
        """True while a sequence is unfinished."""
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
        self._remove_finished()

    def step(
        self, only: Collection[Hashable] | None = None, *, plain: bool = False
    ) -> tuple[StepBatch, list[Sequence]]:
        """Run one step, with the engine's arguments.

        Return the results of the emitting sequences, and the sequences that are given up.
        """
        rejected = self._admit()
        lengths, steps = [len(s.ids) for s in self._held], [s.steps for s in self._held]  # to return to
        try:
            results = self._engine.step(only, plain=plain)
        except (RankLost, torch.AcceleratorError):  # a new engine in this process would fail too
            raise
        except Exception as error:  # any other failure of a step is retried
            keys = [s.key for s in self._held]  # (job, request, choice) of each
            extra = {"action": "step_failed", "sequences": keys}
            log.exception("A step of %d sequences failed", len(self._held), extra=extra)
            named = _suspects_named_by(error, self._held)
            return StepBatch.empty(), [*rejected, *self._roll_back(lengths, steps, named)]
        if self._silent:
            emitted = set(results.numbers.tolist())
            self._silent = {s for s in self._silent if s.number not in emitted}
        failed = self._engine.pop_failed()
        if len(results.finished) or failed:
            self._remove_finished()
        self._raise_limit()
        return results, [*rejected, *failed]

    def _admit(self) -> list[Sequence]:
        """Add waiting sequences to the engine up to the limit; return those that it rejects."""
        rejected = []
        while self._waiting and (self._limit is None or len(self._held) < self._limit):
            sequence = self._waiting.popleft()
            try:
                self._engine.add(sequence)
            except Exception as error:  # e.g. begun by a worker with a longer context
                log.exception("A sequence can't be decoded", extra={"action": "unfit", "sequences": [sequence.key]})
                sequence.failure = f"this worker can't decode the request: {error}"
                rejected.append(sequence)
            else:
                self._held.append(sequence)
                self._silent.add(sequence)
        return rejected

    def _roll_back(self, lengths: list[int], steps: list[int], named: Collection[Sequence]) -> list[Sequence]:
        """Restore the state before the step in a fresh engine; return the sequences to give up: named, or isolated.

        `lengths` and `steps` are those of the held sequences before the step.
        """
        isolated = self._limit == 1 or bool(named)
        given_up = list(named or self._held) if isolated else []
        for sequence, length, step in zip(self._held, lengths, steps, strict=True):
            sequence.cut(length)
            sequence.steps, sequence.finish_reason = step, None
            sequence.slot, sequence.cached = -1, 0
        # Sequences that have not emitted come first: halving then isolates the failing one. The sort is stable.
        suspects = [s for s in sorted(self._held, key=lambda s: s not in self._silent) if s not in given_up]
        self._waiting.extendleft(reversed(suspects))
        self._limit = self._limit if named else max(1, len(self._held) // 2)
        self._num_failures = 0 if isolated else self._num_failures + 1
        self._successes = 0
        self._held, self._silent = [], set()
        self._engine = self._make_engine()
        return given_up

    def _raise_limit(self) -> None:
        """Double the limit once all held sequences have emitted.

        Each failure delays this by one more step, so that a batch that is too large is not retried for ever.
        """
        self._successes += 1
        if self._limit is None or self._successes < self._num_failures or self._silent:
            return
        self._limit, self._successes = 2 * self._limit, 0
        if self._limit >= len(self._held) + len(self._waiting):
            self._limit = None

    def _remove_finished(self) -> None:
        self._waiting = deque(s for s in self._waiting if not s.finished)
        self._held = [s for s in self._held if not s.finished]
        self._silent = {s for s in self._silent if not s.finished}
