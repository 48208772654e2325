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
from worker.engine.gpu.kernels import _multiply_tile as kernel

tile = {"ROWS": 16, "COLUMNS": 32, "INPUTS": 64, "EVEN": True, "BIASED": False, "FP8": True}
for capability, blocks in ((80, True), (90, False)):  # without and with instructions for FP8
    sizes = tile | {"BLOCKS": blocks, "SPAN": 128 if blocks else 64, "GATED": blocks}
    types = dict.fromkeys(("rows", "columns", "inputs", "share"), "i32") | {"scale": "*fp32"}
    types["weight"] = "*u8"
    signature = {arg: "constexpr" if arg in sizes else types.get(arg, "*bf16") for arg in kernel.arg_names}
    constants = {(kernel.arg_names.index(arg),): sizes[arg] for arg in kernel.arg_names if arg in sizes}
    compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    print(capability)
"""


def test_kernels_of_draws_compile_for_a_gpu_without_contraction() -> None:
    assert len(printed_by(SCRIPT)) == 4


def test_products_with_fp8_weights_compile_for_gpus_with_and_without_instructions_for_them() -> None:
    assert printed_by(PRODUCTS) == ["80", "90"]


def printed_by(script: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()
