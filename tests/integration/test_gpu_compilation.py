"""Kernels of draws and products compile for a GPU, without one: the interpreter accepts what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this system")

# A process of its own, because this one has Triton's interpreter instead of its compiler.
SCRIPT = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from worker.engine.sampling import gpu_kernels as kernels

types = {"logits": "*bf16", "copies": "*fp32", "maxima": "*fp32", "lowest": "*fp32", "biases": "*fp32"}
types |= dict.fromkeys(("mask", "parameters", "counts", "keys", "ids"), "*i32")
types |= dict.fromkeys(("columns", "words", "groups", "tiles"), "i32")
sizes = {"GROUP": kernels.GROUP, "TILE": kernels.TILE, "GATHERED": kernels.GATHERED, "GROUPS": 512, "TILES": 128}
sizes |= {"COPIED": True, "MASKED": True, "LISTED": 1024}
for name in ("_adjust_rows", "_find_maxima", "_sum_masses", "_draw_rows"):
    kernel = getattr(kernels, name)
    signature = {arg: "constexpr" if arg in sizes else types.get(arg, "*i64") for arg in kernel.arg_names}
    constants = {(kernel.arg_names.index(arg),): sizes[arg] for arg in kernel.arg_names if arg in sizes}
    source = ASTSource(kernel, signature, constants)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=kernels._EXACT)
    assert "fma.rn.f32" not in built.asm["ptx"], f"{name}: operations are contracted, and round otherwise than a CPU's"
    print(name)
"""


PRODUCTS = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from worker.engine.gpu import kernels

types = dict.fromkeys(("rows", "columns", "inputs", "unit", "share"), "i32")
types |= {"scale": "*fp32", "row_scale": "*fp32", "scales": "*fp32", "static_scale": "fp32", "bound": "fp32"}


def built(kernel, capability, sizes, pointers, warps=4):
    signature = {arg: "constexpr" if arg in sizes else (types | pointers).get(arg, "*bf16") for arg in kernel.arg_names}
    constants = {(kernel.arg_names.index(arg),): sizes[arg] for arg in kernel.arg_names if arg in sizes}
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps}
    return compile(ASTSource(kernel, signature, constants), target=target, options=options).asm["ptx"]


tile = {"ROWS": 16, "COLUMNS": 32, "INPUTS": 64, "EVEN": True, "BIASED": False, "FP8": True, "PIECES": 1, "BRANCH": 1}
for capability, blocks in ((80, True), (90, False)):  # without and with instructions for FP8
    sizes = tile | {"BLOCKS": blocks, "SPAN": 128 if blocks else 64, "GATED": blocks}
    built(kernels._multiply_tile, capability, sizes | {"FP8_ROWS": False, "NATIVE": False}, {"weight": "*u8"})
    print(capability)

tile |= {"ROWS": 64, "COLUMNS": 64, "INPUTS": 128, "SPAN": 128, "FP8_ROWS": True, "GATED": False}
for capability, found in ((80, "f32.f16.f16"), (89, "e4m3.e4m3"), (90, "e4m3.e4m3")):
    sizes = tile | {"NATIVE": capability > 80, "BLOCKS": capability == 90}
    assert found in built(kernels._multiply_tile, capability, sizes, {"weight": "*u8", "x": "*u8"}), capability
    print("rows", capability)
sizes = {"STATIC": False, "POWERS": True, "LEAST": 1e-10, "MAX": 448.0, "SPAN": 128, "BLOCK": 128}
assert "div.rn.f32" in built(kernels._round_span, 80, sizes, {"out": "*u8"}), "scales are not those of a CPU"
"""


SUMS = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from worker.engine.gpu.kernels import _multiply_tile, _norm_rows

def built(kernel, capability, sizes, types):
    signature = {arg: "constexpr" if arg in sizes else types.get(arg, "*bf16") for arg in kernel.arg_names}
    places = {arg: (kernel.arg_names.index(arg),) for arg in kernel.arg_names}
    constants = {places[arg]: sizes[arg] for arg in sizes}
    aligned = {places[arg]: [["tt.divisibility", 16]] for arg in signature if arg not in (*sizes, "rows", "eps")}
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

types = dict.fromkeys(("peers", "pads"), "*i64") | dict.fromkeys(("rows", "width"), "i32") | {"eps": "fp32"}
norm = {"PARTS": 4, "EACH": 2, "BIASED": True, "RANK": 1, "RANKS": 2, "FLAGS": 8, "BLOCK": 1024, "parts": None}
product = {"BRANCH": 4, "PIECES": 1, "ROWS": 64, "COLUMNS": 32, "INPUTS": 64, "SPAN": 64, "EVEN": True, "scale": None}
product |= dict.fromkeys(("BIASED", "GATED", "FP8", "BLOCKS", "FP8_ROWS", "NATIVE"), False)
product |= dict.fromkeys(("bias", "row_scale"))
numbers = dict.fromkeys(("rows", "columns", "inputs", "unit", "share"), "i32") | {"out": "*fp32"}
for capability in (80, 90):
    code = built(_norm_rows, capability, norm, types)
    assert "atom.global.release.sys.cas.b32" in code, "another GPU must see what was written before the flag"
    assert "atom.global.acquire.sys.cas.b32" in code
    assert code.count("ld.global.v4") >= 4, "sums of other ranks are read one number at a time"
    built(_multiply_tile, capability, product, numbers)
    print(capability)
"""


def test_kernels_of_draws_compile_for_a_gpu_without_contraction() -> None:
    assert len(printed_by(SCRIPT)) == 4


def test_products_with_fp8_weights_compile_for_gpus_with_and_without_instructions_for_them() -> None:
    assert printed_by(PRODUCTS) == ["80", "90", "rows", "80", "rows", "89", "rows", "90"]


def test_sums_of_several_ranks_compile_for_gpus_with_flags_that_other_gpus_see() -> None:
    assert printed_by(SUMS) == ["80", "90"]


def printed_by(script: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()
