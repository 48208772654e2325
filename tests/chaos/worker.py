"""A worker with injected faults: `python -m tests.chaos.worker`.

It is the worker of the service with a few patches, which are all in this program: the product has no switch that
injects faults. The prompt POISON kills the process when it is admitted, as a crash of a kernel would. HANG stops the
engine thread for ever. Every step takes CHAOS_STEP_S seconds longer, so that a tiny model is still decoding when the
next fault comes. Its request process is that of `tests.chaos.request_process`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from jobs.messages import CHAT_ENDPOINT, GenerationRequest, SamplingParameters
from tests.chaos.request_process import MODULE
from worker import start, tasks
from worker.engine.engine import Engine
from worker.engine.sequence import Sequence
from worker.engine.stats import StepBatch
from worker.loading.loader import LoadedModel
from worker.serving import request_process

POISON = "the prompt that kills"
HANG = "the prompt that hangs"
STEP_VARIABLE = "CHAOS_STEP_S"


def main() -> int:
    """Serve with the settings of the environment and the faults above."""
    load, add, step = tasks.load_engine, Engine.add, Engine.step  # type: ignore[attr-defined]
    prompts: dict[tuple[int, ...], str] = {}  # by token ids: the engine has no texts
    step_s = float(os.environ.get(STEP_VARIABLE, "0"))

    def noted_load(*given: Any, **named: Any) -> LoadedModel:
        loaded = load(*given, **named)
        for prompt in (POISON, HANG):
            request = GenerationRequest(model=loaded.name, prompt=prompt, sampling=SamplingParameters(seed=1))
            prompts[tuple(loaded.codec.encode(request, CHAT_ENDPOINT))] = prompt
        return loaded

    def deadly_add(engine: Engine, sequence: Sequence) -> None:
        match prompts.get(tuple(sequence.ids[: sequence.num_prompt])):
            case prompt if prompt == POISON:
                os.kill(os.getpid(), signal.SIGKILL)
            case prompt if prompt == HANG:
                time.sleep(3600)
        add(engine, sequence)

    def slow_step(engine: Engine, *given: Any, **named: Any) -> StepBatch:
        time.sleep(step_s)
        return step(engine, *given, **named)

    request_process.MODULE = MODULE
    tasks.load_engine = noted_load  # type: ignore[attr-defined]
    Engine.add = deadly_add  # type: ignore[assignment, method-assign]
    Engine.step = slow_step  # type: ignore[assignment, method-assign]
    return start.main()


if __name__ == "__main__":
    sys.exit(main())
