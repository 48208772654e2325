"""Call the functions of layout.c, which lay out a step's rows in microseconds."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worker.engine.cpu.compiler import EXACT, library
from worker.engine.cpu.kernels import address, bound, members
from worker.engine.paged import work
from worker.engine.segments import IntArray, KvMoves, Segments

if TYPE_CHECKING:
    from worker.engine.paged.kv import PagedKv
    from worker.engine.paged.rows import Shape

_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p
_COLUMNS = ("slots", "prefixes", "starts", "counts", "chains", "ids", "positions", "kept", "visible_counts", "visible")


class SegmentArrays(ctypes.Structure):
    """`segments_t`: the segments of a forward."""

    _fields_ = (
        *members("segments rows kept_rows", _SIZE),
        *((name, _ADDRESS) for name in _COLUMNS),
    )
    columns: list[NDArray[Any]]  # keeps the arrays


class BlockTables(ctypes.Structure):
    """`tables_t`: the blocks of all slots."""

    _fields_ = (*members("tables held references", _ADDRESS), *members("width slots block_size", _SIZE))


class ShapeSizes(ctypes.Structure):
    """`shape_t`: sizes of a forward."""

    _fields_ = members("rows kept sequences listed causal shares tile chunk max_listed", _SIZE)


class CompiledLayout:
    """The compiled functions. Calls keep the interpreter's lock: they take microseconds."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from layout.c."""
        functions = ctypes.PyDLL(compiled._name)
        self._unprepared = bound(functions.unprepared, _ADDRESS, _ADDRESS, result=_SIZE)
        self._measure = bound(functions.measure, _ADDRESS, _SIZE, _SIZE, _ADDRESS)
        self._lay_out = bound(functions.lay_out, *[_ADDRESS] * 4, result=_SIZE)
        self._moved_entries = bound(functions.moved_entries, _ADDRESS, _SIZE, _SIZE, *[_ADDRESS] * 5, result=_SIZE)
        self._last: tuple[Segments | None, Any] = None, None  # the segments of a step are read by three calls

    def prepared(self, segments: Segments, kv: PagedKv) -> bool:
        """Return whether `reserve` has nothing to do for these segments."""
        return not self._unprepared(self._arrays(segments), ctypes.addressof(kv.layout))

    def measure(self, segments: Segments, max_listed: int) -> tuple[bool, int, int, int]:
        """Return whether all segments are chains of one row, and the most entries that a row would list.

        Then the partial results if rows list none, and if they list up to `max_listed`: see `total_parts`.
        """
        out = np.empty(4, np.int64)
        self._measure(self._arrays(segments), work.CHUNK, max_listed, address(out))
        plain, longest, parts, parts_if_listed = out.tolist()
        return bool(plain), longest, parts, parts_if_listed

    def lay_out(self, segments: Segments, kv: PagedKv, shape: Shape, tile: int, max_listed: int) -> IntArray:
        """Return the flat tensor of `laid_out` for a shape with one slice, and `tile` rows in a tile."""
        numbers = (shape.rows, shape.kept, shape.sequences, shape.listed, shape.causal, shape.queries > 1)
        sizes, flat = ShapeSizes(*numbers, tile, work.CHUNK, max_listed), np.empty(shape.size, np.int64)
        given = (self._arrays(segments), ctypes.addressof(kv.layout), ctypes.addressof(sizes), address(flat))
        return flat[: self._lay_out(*given)]

    def moved_entries(self, moves: KvMoves, kv: PagedKv) -> tuple[IntArray, bool]:
        """Return the pool's entries that the moves come from and go to [2, entries], and whether the slots own them."""
        given = (moves.slots, moves.destinations, moves.counts, moves.sources)
        columns = [np.ascontiguousarray(column) for column in given]  # which live until C has read them
        out, sizes = np.empty((2, len(moves.sources)), np.int64), (len(moves.slots), len(moves.sources))
        owned = self._moved_entries(ctypes.addressof(kv.layout), *sizes, *map(address, columns), address(out))
        return out, bool(owned)

    def _arrays(self, segments: Segments) -> Any:
        """Return a pointer to the C structure of the segments, which it keeps."""
        held, pointer = self._last
        if held is not segments:
            sizes = (len(segments), segments.num_rows, len(segments.kept))
            columns = [getattr(segments, name) for name in _COLUMNS]
            if not all(column.flags.c_contiguous for column in columns):
                columns = [np.ascontiguousarray(column) for column in columns]
            arrays = SegmentArrays(*sizes, *map(address, columns))
            arrays.columns = columns
            pointer = ctypes.byref(arrays)
            self._last = segments, pointer
        return pointer


@cache
def compiled_layout() -> CompiledLayout | None:
    """Return the compiled functions; None without a C compiler."""
    compiled = library(Path(__file__).with_name("layout.c"), *EXACT)
    return None if compiled is None else CompiledLayout(compiled)
