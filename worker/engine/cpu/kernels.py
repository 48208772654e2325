"""The compiled CPU kernels: load `kernels.c` for a dtype, and call it with tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from worker.engine.cpu.compiler import library
from worker.engine.cpu.huge_pages import HugePages

_SOURCE = Path(__file__).with_name("kernels.c")
_DEFINES = {torch.bfloat16: ("-DBFLOAT16",), torch.float32: ()}


_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


def members(names: str, kind: Any) -> list[tuple[str, Any]]:
    """Return members of a C structure, all of one type."""
    return [(name, kind) for name in names.split()]


class Product(ctypes.Structure):
    """`product_t`: one packed weight [columns, inputs]."""

    _fields_ = (
        members("weight bias scale bounds", _ADDRESS)
        + members("columns inputs kind blocks parts rows", _SIZE)
        + members("row_scale row_bound", ctypes.c_float)
    )


def product_array(products: Sequence[Product]) -> ctypes.Array[Product]:
    """Return products as an array; it points to the same weights."""
    return (Product * len(products))(*products)


EXCHANGE = ctypes.CFUNCTYPE(None, _SIZE)


class SplitSums(ctypes.Structure):
    """`split_t`: how ranks add up a product whose inputs they share."""

    _fields_ = members("sums", _ADDRESS) + members("rank ranks each", _SIZE) + members("exchange", EXCHANGE)


class View(ctypes.Structure):
    """`view_t`: the KV entries that each row of a step attends to."""

    _fields_ = members("first prefix extra_start extra group_start", _ADDRESS) + members("groups end", _SIZE)


class Plan(ctypes.Structure):
    """`plan_t`: the rows of a step and the KV slots they go to."""

    _fields_ = (
        members("rows heads kv_heads dim capacity fp8 latent", _SIZE)
        + members("slot index", _ADDRESS)
        + members("scale softcap", ctypes.c_float)
        + members("sinks", _ADDRESS)
    )


class Heads(ctypes.Structure):
    """`heads_t`: queries, keys and values of one layer."""

    _fields_ = (
        members("query key value", _ADDRESS)
        + members("query_row query_head key_row key_head value_row value_head", _SIZE)
        + members("cos sin query_norm key_norm", _ADDRESS)
        + members("eps", ctypes.c_float)
    )


class LayerWeights(ctypes.Structure):
    """`layer_t`: the weights of one decoder layer."""

    _fields_ = (
        members("norm_1 norm_2 query_norm key_norm", _ADDRESS)
        + members("qkv o gate_up down", Product)
        + members("view tap", _SIZE)
    )


class Scratch(ctypes.Structure):
    """`scratch_t`: buffers for the intermediate rows of a step."""

    _fields_ = members("normed stacked mixed gated rounded", _ADDRESS)


class Network(ctypes.Structure):
    """`network_t`: a whole model; `unit` and `join` are set for a draft head."""

    _fields_ = (
        members("embedding cos sin layers", _ADDRESS)
        + members("count width layer_size taps", _SIZE)
        + members("eps", ctypes.c_float)
        + members("norm", _ADDRESS)
        + members("output", Product)
        + members("unit", _ADDRESS)
        + members("join", Product)
        + members("split", _ADDRESS)
    )


class Forward(ctypes.Structure):
    """`forward_t`: inputs and outputs of one forward of a network."""

    _fields_ = (
        members("ids positions kept", _ADDRESS)
        + members("count", _SIZE)
        + members("states x cos sin joined last tapped logits", _ADDRESS)
    )


class WeightKind(IntEnum):
    """`kind_t`: how the weights of a product are stored."""

    SCALARS = 0
    INT8 = 1
    FP8 = 2

    @classmethod
    def of(cls, dtype: torch.dtype) -> Self:
        """Return the kind of weights in a dtype."""
        kinds = {torch.int8: cls.INT8, torch.float8_e4m3fn: cls.FP8}
        return cls(kinds.get(dtype, cls.SCALARS))


class RowKind(IntEnum):
    """`rows_t`: how the rows of a product with FP8 weights are rounded."""

    AS_THEY_ARE = 0
    DYNAMIC = 1
    POWERS_OF_TWO = 2
    STATIC = 3


class Finish(IntEnum):
    """`finish_t`: how the sums of a product are stored."""

    STORE = 0
    GATE = 2
    STORE_FLOAT = 3


DECODED_FP8 = 256.0  # what decoded FP8 weights must be multiplied with


class Kernels:
    """The compiled functions for one dtype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from kernels.c."""
        size, address, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
        self.version = Path(library._name).stem
        self.panel, self.block = int(library.panel_columns()), int(library.block_rows())
        self._weights = HugePages()
        self._pack = bound(library.pack, address, address, address, size, size, size)
        self._packed_size = bound(library.packed_size, size, size, size, result=size)
        self.rounded_row_bytes = bound(library.rounded_row_bytes, ctypes.POINTER(Product), result=size)
        self._rms_norm = bound(library.rms_norm, address, address, address, size, size, real)
        self.multiply = bound(library.multiply, ctypes.POINTER(Product), address, address, size, size, address)
        self.multiply_each = bound(library.multiply_each, ctypes.POINTER(Product), size, address, address, size)
        self.attend = bound(
            library.attend, ctypes.POINTER(Plan), ctypes.POINTER(View), ctypes.POINTER(Heads), address, address, address
        )
        self.move_entries = bound(
            library.move_entries, address, address, ctypes.POINTER(Plan), *[size] * 4, address, size
        )
        self.run_layers = bound(
            library.run_layers,
            ctypes.POINTER(LayerWeights),
            size,
            ctypes.POINTER(Plan),
            ctypes.POINTER(View),
            ctypes.POINTER(Scratch),
            *[address] * 5,
            size,
            size,
            real,
            address,
            size,
        )

        self.run_network = bound(
            library.run_network,
            *[ctypes.POINTER(kind) for kind in (Network, Plan, View, Scratch, Forward)],
            address,
            address,
        )

    def pack(self, weight: Tensor, second: Tensor | None = None, into: Tensor | None = None) -> Tensor:
        """Pack `weight` [columns, inputs] for `multiply`; with `second`, alternate half panels of both.

        `into` is a packed weight of the same shape and dtype, which is overwritten.
        """
        parts = [part.contiguous() for part in (weight, second) if part is not None]
        columns, inputs, kind = sum(map(len, parts)), weight.shape[1], WeightKind.of(weight.dtype)
        packed = self._weights.empty(self._packed_size(columns, inputs, kind), weight.dtype) if into is None else into
        first, other = [*(part.data_ptr() for part in parts), None][:2]
        self._pack(first, other, packed.data_ptr(), columns, inputs, kind)
        return packed

    def pack_scale(self, scale: Tensor, second: Tensor | None = None) -> Tensor:
        """Return scales [groups, columns] in the order of packed columns, padded with zeros."""
        width = self.panel if second is None else self.panel // 2
        parts = [pad(part, (0, -part.shape[1] % width)) for part in (scale, second) if part is not None]
        return torch.stack([part.view(len(scale), -1, width) for part in parts], 2).flatten(1).contiguous()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the normed rows of `x` [rows, width], which is contiguous."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out


@cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels for a dtype; None if they don't support it or can't be compiled."""
    if dtype not in _DEFINES:
        return None
    source, options = source_options(dtype)
    compiled = library(source, *options)
    return None if compiled is None else Kernels(compiled)


def source_options(dtype: torch.dtype) -> tuple[Path, tuple[str, ...]]:
    """Return the source of the kernels and the options that compile it for a dtype that they support."""
    return _SOURCE, _DEFINES[dtype]


def bound(function: Any, *arguments: Any, result: Any = None) -> Callable[..., Any]:
    """Return a C function with its types set."""
    function.argtypes, function.restype = arguments, result
    return function  # type: ignore[no-any-return]


def address(array: NDArray[Any]) -> int:
    """Return the address of a contiguous array's data, ten times as fast as `array.ctypes.data`: a step asks often."""
    assert array.flags.c_contiguous, "C reads contiguous arrays"
    return _pointer_at(id(array) + _DATA).value if _DATA else array.ctypes.data  # type: ignore[return-value]


def _offset_of_data() -> int:
    """Return where an array object keeps the address of its data: behind the head of all objects. 0: not there."""
    offset, probe = object.__basicsize__, np.arange(3)
    return offset if ctypes.c_void_p.from_address(id(probe) + offset).value == probe.ctypes.data else 0


_pointer_at = ctypes.c_void_p.from_address
_DATA = _offset_of_data()
