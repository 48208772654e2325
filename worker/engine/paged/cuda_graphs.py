"""Capture of forwards as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")
_WARM_UPS = 2  # runs before a capture: libraries initialise in the first ones


class GraphCapture(Protocol):
    """Captures work on fixed buffers as a repeatable call."""

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return a function that repeats the work on the current contents of the buffers."""


def no_capture(work: Callable[[], T]) -> Callable[[], T]:
    """Capture nothing: return the work itself."""
    return work


def graph_capture(device: torch.device) -> GraphCapture:
    """Return CUDA graph capture for a GPU, `no_capture` for other devices."""
    return CudaGraphs() if device.type == "cuda" else no_capture


class CudaGraphs:
    """Captures CUDA graphs that share their memory.

    The next replay of any of them overwrites the outputs of the last.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        """Capture the work; if that fails, log a warning and return the work itself."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = work()
        except RuntimeError as error:
            log.warning(
                "A forward can't be captured as a CUDA graph and runs slower: %s", error, extra={"action": "no_graph"}
            )
            return work

        def replay() -> T:
            graph.replay()
            return outputs

        return replay
