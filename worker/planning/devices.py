"""GPUs that can be planned for: what their makers say they hold and do, and what of that a step gets.

Every number has its source beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of GPU, as its data sheet has it."""

    name: str
    memory_bytes: int
    bytes_per_s: float  # of its memory
    flops: dict[str, float]  # dense, by dtype
    link_bytes_per_s: float  # to the other GPUs of the node, one direction

    def with_memory(self, gib: float | None) -> Device:
        """Return the device with another size of memory, if one is given."""
        return self if gib is None else replace(self, memory_bytes=int(gib * GIB))


# H100 SXM: NVIDIA H100 data sheet (80 GB HBM3 at 3.35 TB/s; 989 TFLOP/s bfloat16 dense; 67 TFLOP/s float32, which is
# what torch takes for float32 products unless TF32 is asked for; NVLink 900 GB/s, both directions together).
# H200: NVIDIA H200 data sheet (the same chip with 141 GB HBM3e at 4.8 TB/s). A100 SXM: NVIDIA A100 data sheet (80 GB
# HBM2e at 2.04 TB/s; 312 TFLOP/s bfloat16; 19.5 TFLOP/s float32; NVLink 600 GB/s).
DEVICES = {
    device.name: device
    for device in (
        Device("h100", 80 * GIB, 3.35e12, {"bfloat16": 989e12, "float32": 67e12}, 450e9),
        Device("h200", 141 * 10**9, 4.8e12, {"bfloat16": 989e12, "float32": 67e12}, 450e9),
        Device("a100", 80 * GIB, 2.04e12, {"bfloat16": 312e12, "float32": 19.5e12}, 300e9),
    )
}

# What our kernels get of the data sheet, and what a kernel costs beside its bytes when the next one waits for it.
# Fitted to steps that were measured on an H100: docs/measurements/2026-11-27-h100.md says how far off each is.
MEMORY_SHARE = 0.93
FLOPS_SHARE = 0.74
HALF_WIDTH = 3700  # of a model whose products get half of that
RAMP_S = 5e-6
HOST_S = 0.25e-3  # laying out the rows, and fetching what was drawn
FUSED_KERNELS_PER_LAYER = 9  # of gpu_layers; a test holds it

# A collective over NVLink takes this much before the first byte counts. Assumed, from published nccl-tests tables of
# DGX H100 nodes, where all-reduces of a few KiB take 10 to 20 us whatever their size.
COLLECTIVE_S = 15e-6

# Replicas of several GPUs run as transformers wrote them: the host starts every kernel on its own. 4 us a launch is
# PyTorch's usual cost on a server CPU (assumed); how many operations a layer starts was counted, a test holds it.
LAUNCH_S = 4e-6
KERNELS_PER_LAYER = 40
