"""Kernels: compile `kernels.c` for this processor, once, and call it with tensors.

language_model -> layers, linear, native_attention -> [kernels]. Where there is no C compiler, torch's own
operations do the same work: slower, and a row's last bits may then depend on its batch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = (
    "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -shared -fPIC"
)
_NUMBERS = {torch.bfloat16: ("-DBFLOAT16",), torch.float32: ()}


_SIZE, _ADDRESS = ctypes.c_int64, ctypes.c_void_p


def _fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Product(ctypes.Structure):
    """`product_t`: one packed weight [columns, inputs]."""

    _fields_ = _fields("weight bias", _ADDRESS) + _fields("columns inputs", _SIZE)


class View(ctypes.Structure):
    """`view_t`: what the rows of a step see."""

    _fields_ = _fields("first prefix extra_start extra", _ADDRESS) + _fields("end", _SIZE)


class Plan(ctypes.Structure):
    """`plan_t`: the rows of a step and the KV slots they go to."""

    _fields_ = (
        _fields("rows heads kv_heads dim capacity", _SIZE)
        + _fields("slot index", _ADDRESS)
        + _fields("scale", ctypes.c_float)
    )


class Heads(ctypes.Structure):
    """`heads_t`: queries, keys and values of one layer."""

    _fields_ = (
        _fields("query key value", _ADDRESS)
        + _fields("query_row query_head key_row key_head value_row value_head", _SIZE)
        + _fields("cos sin query_norm key_norm", _ADDRESS)
        + _fields("eps", ctypes.c_float)
    )


class Layer(ctypes.Structure):
    """`layer_t`: the weights of one decoder layer."""

    _fields_ = (
        _fields("norm_1 norm_2 query_norm key_norm", _ADDRESS)
        + _fields("qkv o gate_up down", Product)
        + _fields("view tap", _SIZE)
    )


class Scratch(ctypes.Structure):
    """`scratch_t`: room for the intermediate rows of a step."""

    _fields_ = _fields("normed stacked mixed gated", _ADDRESS)


class Finish(IntEnum):
    """`finish_t`: what becomes of a product's sums."""

    STORE = 0
    STORE_FLOAT = 3


class Kernels:
    """The compiled functions for one type of number."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Bind the functions of a library compiled from kernels.c."""
        size, address, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
        self.version = Path(library._name).stem
        self.panel = int(library.panel_columns())
        self._pack = _bound(library.pack, address, address, address, size, size)
        self._packed_size = _bound(library.packed_size, size, size, result=size)
        self._rms_norm = _bound(library.rms_norm, address, address, address, size, size, real)
        self.multiply = _bound(library.multiply, ctypes.POINTER(Product), address, address, size, size)
        self.attend = _bound(
            library.attend, ctypes.POINTER(Plan), ctypes.POINTER(View), ctypes.POINTER(Heads), address, address, address
        )
        self.move_entries = _bound(
            library.move_entries, address, address, ctypes.POINTER(Plan), *[size] * 4, address, size
        )
        self.run_layers = _bound(
            library.run_layers,
            ctypes.POINTER(Layer),
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

    def pack(self, weight: Tensor, second: Tensor | None = None) -> Tensor:
        """Return `weight` [columns, inputs] as `multiply` wants it; with `second`, both in alternating half panels."""
        parts = [part.contiguous() for part in (weight, second) if part is not None]
        columns, inputs = sum(map(len, parts)), weight.shape[1]
        packed = torch.empty(self._packed_size(columns, inputs), dtype=weight.dtype)
        first, other = [*(part.data_ptr() for part in parts), None][:2]
        self._pack(first, other, packed.data_ptr(), columns, inputs)
        return packed

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the normed rows of `x` [rows, width], which is contiguous."""
        out = torch.empty_like(x)
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
        return out


def _bound(function: Any, *arguments: Any, result: Any = None) -> Callable[..., Any]:
    function.argtypes, function.restype = arguments, result
    return function  # type: ignore[no-any-return]


@cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """Return the kernels for a dtype; None, with a warning, where they can't be compiled."""
    if dtype not in _NUMBERS:
        return None
    try:
        return Kernels(ctypes.CDLL(str(_compiled(_NUMBERS[dtype]))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning(
            "Decoding goes on without compiled kernels, slower: %s. Install gcc to have them.",
            said,
            extra={"action": "no_kernels"},
        )
        return None


def _compiled(number: tuple[str, ...]) -> Path:
    """Return the library, compiled at most once per source, compiler and processor."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        raise FileNotFoundError("there is no C compiler")
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    identity = (
        _SOURCE.read_text(),
        compiler,
        version,
        _FLAGS,
        *number,
        platform.machine(),
        processor(),
        torch.__version__,
    )
    name = f"kernels-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    target = _folder() / name
    if not target.exists():
        # Into a file of our own, then renamed: processes that start together never load a half-written library.
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as written:
            command = [compiler, *_FLAGS.split(), *number, str(_SOURCE), "-o", written.name, *_openmp(), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(written.name, target)
    return target


def _folder() -> Path:
    wanted = Path(platformdirs.user_cache_dir("basic")) / "kernels"
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="basic-kernels-"))
    return wanted


def processor() -> str:
    """Return what this processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _openmp() -> list[str]:
    """Name torch's own OpenMP runtime to the linker: a second one would bring threads that fight for the cores."""
    return [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))[:1]]
