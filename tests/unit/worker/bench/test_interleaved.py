"""Interleaved engines on one target write the same texts as alone and share the time evenly."""

from __future__ import annotations

import pytest
import torch

from tests.models import packed, tiny
from tests.unit.worker.engine.harness import decode, drafter, engine, options, outputs, sequences
from worker.bench import interleaved
from worker.engine.engine import Engine
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import chain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interleaved_engines_write_the_same_texts_as_alone(temperature: float) -> None:
    model, sampling = tiny("llama"), Sampling(temperature=temperature)
    alone = sequences(sampling=sampling)
    decode(engine(packed(model), None, options(Mode.PLAIN)), alone)
    target = packed(model, slots=8)
    racing = [sequences(sampling=sampling) for _ in range(2)]
    engines = [
        engine(interleaved.SlotRange(target, 0, 4), drafter("same"), options(Mode.PAPER)),
        engine(interleaved.SlotRange(target, 4, 4), None, options(Mode.PLAIN)),
    ]
    for running, some in zip(engines, racing, strict=True):
        for sequence in some:
            running.add(sequence)
    interleaved.run_interleaved(engines)
    assert [outputs(some) for some in racing] == [outputs(alone)] * 2


def test_slot_ranges_do_not_overlap() -> None:
    target = packed(tiny("llama"), slots=2)
    one, other = interleaved.SlotRange(target, 0, 1), interleaved.SlotRange(target, 1, 1)
    before = one.forward([chain(0, 0, [5, 6, 7], keep_last=True)]).clone()
    other.forward([chain(0, 0, [8, 9, 10], keep_last=True)])
    other.clear()
    again = one.forward([chain(0, 2, [7], keep_last=True)])
    assert torch.allclose(before, again, atol=1e-5)


def test_the_engine_with_the_least_time_steps_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, turns = [0.0], []

    class Stepper(Engine):
        """An engine with `steps` steps of `seconds` each."""

        def __init__(self, name: str, seconds: float, steps: int) -> None:
            self._name, self._takes, self._left = name, seconds, steps

        @property
        def busy(self) -> bool:
            return self._left > 0

        def step(self, *_: object, **__: object) -> list[object]:  # type: ignore[override]
            self._left -= 1
            clock[0] += self._takes
            turns.append(self._name)
            return []

    monkeypatch.setattr(interleaved, "perf_counter", lambda: clock[0])
    assert interleaved.run_interleaved([Stepper("slow", 3.0, 2), Stepper("quick", 1.0, 8)]) == [6.0, 8.0]
    assert turns == ["slow", "quick", "quick", "quick", "slow", *["quick"] * 5]
