"""A request process that can be made to go wrong: `tests.chaos.worker` starts it in place of the service's own.

A prompt with DEADLY_TEXT in it kills the process when it is tokenized, as one that crashes a tokenizer would, and one
with ENDLESS_TEXT stops it for good.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from jobs.processes import parent_death_hook
from worker.serving import request_process

if TYPE_CHECKING:
    from jobs.messages import GenerationRequest
    from worker.text.codec import Codec

MODULE = "tests.chaos.request_process"
DEADLY_TEXT = "the prompt that kills its tokenizer"
ENDLESS_TEXT = "the prompt that freezes its tokenizer"


def main() -> int:
    """Serve, with the faults above."""
    die_with_parent = parent_death_hook(int(sys.argv[2]))
    if die_with_parent is not None:
        die_with_parent()
    sys.modules["torch"] = None  # type: ignore[assignment]  # as the process itself does
    from worker.text.codec import Codec  # takes a second

    encode = Codec.encode

    def deadly_encode(codec: Codec, request: GenerationRequest, endpoint: str) -> list[int]:
        if request.prompt is not None and DEADLY_TEXT in request.prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.prompt is not None and ENDLESS_TEXT in request.prompt:
            os.kill(os.getpid(), signal.SIGSTOP)
        return encode(codec, request, endpoint)

    Codec.encode = deadly_encode  # type: ignore[assignment, method-assign]
    return request_process.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
