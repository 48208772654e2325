"""GPU data sheets, and how much of them a step achieves. Every number has its source beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """Data sheet of a GPU."""

    name: str
    memory_bytes: int
    bytes_per_s: float  # memory bandwidth
    flops: dict[str, float]  # dense FLOP/s by dtype
    link_bytes_per_s: float  # NVLink bandwidth to the other GPUs of the node, one direction

    def with_memory(self, gib: float | None) -> Device:
        """Return the device with another memory size; None keeps it."""
        return self if gib is None else replace(self, memory_bytes=int(gib * GIB))


# H100 SXM: NVIDIA H100 data sheet (80 GB HBM3 at 3.35 TB/s; 989 TFLOP/s bfloat16 dense; 67 TFLOP/s float32, which
# torch uses for float32 matrix products unless TF32 is enabled; NVLink 900 GB/s, both directions together).
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

# Share of the data sheet that the kernels achieve, and the fixed cost of a kernel in a chain of dependent kernels.
# Fitted to steps measured on an H100; docs/measurements/2026-11-27-h100.md has the error of each.
MEMORY_SHARE = 0.93
FLOPS_SHARE = 0.74
HALF_WIDTH = 3700  # model width at which matrix products achieve half of FLOPS_SHARE
RAMP_S = 5e-6  # per kernel: start and end with most of the device idle
HOST_S = 0.5e-3  # per step of the engine's thread, while the device waits (worker.bench.host_costs)
HOST_ROW_S = 2.5e-6  # the same, per sequence
DRAW_READS = 2.0  # times that a draw reads the logits of a row
FUSED_KERNELS_PER_LAYER = 9  # a test counts them

# Latency of one exchange of sums: ranks raise flags in each other's memory inside the norm kernel. Not measured. It is
# assumed to be at most that of NCCL's all-reduce of up to 64 KiB between two H100 in a CUDA graph, about 6 us
# (github.com/NVIDIA/nccl/issues/1259, 2024).
EXCHANGE_S = 6e-6

# Latency of a collective over NVLink: the gather of the logits, and the all-reduces of models that transformers split.
# Assumed, from published nccl-tests tables of DGX H100 nodes: all-reduces of a few KiB take 10 to 20 us at any size.
COLLECTIVE_S = 15e-6

# Models that transformers split run its modules without CUDA graphs: the host launches every kernel. 4 us per launch is
# PyTorch's usual cost on a server CPU (assumed). A test counts the operations of a layer.
LAUNCH_S = 4e-6
KERNELS_PER_LAYER = 40

MEASURED = "h100"  # the GPU on which steps of one rank were measured, with weights and KV in bfloat16
