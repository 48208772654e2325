"""Recordings of forwards as CUDA graphs: one launch instead of hundreds. The only code here that needs a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")
_WARM_UPS = 2  # runs before the recording: libraries set themselves up in the first ones


class GraphCapture(Protocol):
    """Makes a repeatable call of some work on fixed buffers."""

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        """Return what does the work again on whatever the buffers hold then."""


def no_capture(work: Callable[[], T]) -> Callable[[], T]:
    """GraphCapture nothing: the work itself, every time."""
    return work


def graph_capture(device: torch.device) -> GraphCapture:
    """Return what a device can do."""
    return CudaGraphs() if device.type == "cuda" else no_capture


class CudaGraphs:
    """Records work as CUDA graphs that share their memory.

    The outputs of a replay are overwritten by the next one of any of them.
    """

    def __init__(self) -> None:
        """Start without a graph."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> Callable[[], T]:
        """GraphCapture the work; if it can't be recorded, leave it as it is."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = work()
        except RuntimeError as error:
            log.warning(
                "A forward could not be recorded and runs step by step: %s", error, extra={"action": "no_graph"}
            )
            return work

        def replay() -> T:
            graph.replay()
            return outputs

        return replay
