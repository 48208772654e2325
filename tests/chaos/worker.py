"""A worker with injected faults: `python -m tests.chaos.worker`.

It is the worker of the service with a few patches, which are all in this program: the product has no switch that
injects faults. A prompt that contains POISON kills the process when it is admitted, as a crash of a kernel would. One
that contains HANG stops the engine thread for ever. Every step takes CHAOS_STEP_S seconds longer, so that a tiny model
is still decoding when the next fault comes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from jobs.messages import GenerationRequest
from worker import start
from worker.engine.engine import Engine
from worker.engine.sequence import Sequence
from worker.engine.stats import StepBatch
from worker.text.codec import Codec

POISON = "the prompt that kills"
HANG = "the prompt that hangs"
STEP_VARIABLE = "CHAOS_STEP_S"


def main() -> int:
    """Serve with the settings of the environment and the faults above."""
    encode, add, step = Codec.encode, Engine.add, Engine.step
    hanging: set[tuple[int, ...]] = set()  # token ids of prompts with HANG: the engine has no texts
    step_s = float(os.environ.get(STEP_VARIABLE, "0"))

    def deadly_encode(codec: Codec, request: GenerationRequest, endpoint: str) -> list[int]:
        if request.prompt is not None and POISON in request.prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = encode(codec, request, endpoint)
        if request.prompt is not None and HANG in request.prompt:
            hanging.add(tuple(ids))
        return ids

    def hanging_add(engine: Engine, sequence: Sequence) -> None:
        if tuple(sequence.ids[: sequence.num_prompt]) in hanging:
            time.sleep(3600)
        add(engine, sequence)

    def slow_step(engine: Engine, *given: Any, **named: Any) -> StepBatch:
        time.sleep(step_s)
        return step(engine, *given, **named)

    Codec.encode = deadly_encode  # type: ignore[assignment, method-assign]
    Engine.add = hanging_add  # type: ignore[assignment, method-assign]
    Engine.step = slow_step  # type: ignore[assignment, method-assign]
    return start.main()


if __name__ == "__main__":
    sys.exit(main())
