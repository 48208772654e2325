"""Capture of forwards as CUDA graphs: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
_WARM_UPS = 2  # runs before a capture: libraries initialise in the first ones


class CaptureFailed(Exception):
    """Work that can't be captured."""


@dataclass(frozen=True, slots=True)
class Captured(Generic[T]):
    """Captured work."""

    replay: Callable[[], T]  # repeats it on the current contents of its buffers
    bytes: int = 0  # memory that the capture took


class GraphCapture(Protocol):
    """Captures work on fixed buffers."""

    def __call__(self, work: Callable[[], T]) -> Captured[T]:
        """Return the captured work. Raises CaptureFailed."""


def no_capture(work: Callable[[], T]) -> Captured[T]:
    """Capture nothing: return the work itself."""
    return Captured(work)


def graph_capture(device: torch.device) -> GraphCapture:
    """Return CUDA graph capture for a GPU, `no_capture` for other devices."""
    return CudaGraphs() if device.type == "cuda" else no_capture


class CudaGraphs:
    """Captures CUDA graphs that share their memory.

    The next replay of any of them overwrites the outputs of the last.
    """

    def __init__(self) -> None:
        """Create the memory pool."""
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], T]) -> Captured[T]:
        """Capture the work. Raises CaptureFailed."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        free_bytes = torch.cuda.mem_get_info()[0]
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = work()
        except RuntimeError as error:
            raise CaptureFailed(str(error)) from error

        def replay() -> T:
            graph.replay()
            return outputs

        return Captured(replay, max(0, free_bytes - torch.cuda.mem_get_info()[0]))
