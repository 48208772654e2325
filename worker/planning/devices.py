"""GPUs that can be planned for: what their makers say they hold and do, and what of that a step gets.

[devices] -> forecast.  Every number has its source beside it. None of them was measured by us: docs/scale.md says which
command replaces which number once a GPU is at hand.
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

# What real kernels get of the data sheet. Assumed, from what others report: streaming kernels reach 80 to 90 % of the
# memory's rate on Hopper, and large matrix products 60 to 75 % of the tensor cores' peak.
MEMORY_SHARE = 0.8
FLOPS_SHARE = 0.6

# A collective over NVLink takes this much before the first byte counts. Assumed, from published nccl-tests tables of
# DGX H100 nodes, where all-reduces of a few KiB take 10 to 20 us whatever their size.
COLLECTIVE_S = 15e-6

# The host starts every kernel on its own when a step is not captured as a CUDA graph. 4 us a launch is PyTorch's usual
# cost on a server CPU (assumed); how many operations a layer of the packed forward starts was counted, a test holds it.
LAUNCH_S = 4e-6
KERNELS_PER_LAYER = 40
