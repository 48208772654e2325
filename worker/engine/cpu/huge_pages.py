"""Memory on huge pages, for weights: a step reads all of them, and a small page ends every prefetch after 4 KiB."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes
_REGION = 64 << 20  # bytes that are mapped at once; the operating system commits them page by page
_LINE = 64  # bytes of a cache line


class HugePages:
    """Allocates tensors one behind the other in large regions. A region is freed with the last of its tensors."""

    def __init__(self) -> None:
        self._region = mmap.mmap(-1, mmap.PAGESIZE)
        self._used = self._size = 0

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return `size` elements that start at a cache line; they are zeros."""
        count = size * dtype.itemsize
        if self._size - self._used < count:
            self._map(max(count, _REGION))
        start = self._used
        self._used += -(-count // _LINE) * _LINE
        return torch.frombuffer(self._region, dtype=dtype, count=size, offset=start)

    def _map(self, count: int) -> None:
        """Map a new region with room for `count` bytes from its first huge page on."""
        self._region = mmap.mmap(-1, count + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages
                self._region.madvise(mmap.MADV_HUGEPAGE)
        first = torch.frombuffer(self._region, dtype=torch.uint8).data_ptr()
        self._used = -first % _HUGE_PAGE
        self._size = len(self._region)
