"""Predict the time of a step: bytes and FLOPs against the device's rates, collectives, kernel launches.

The prediction compares placements before there is a machine. The worker's own calibration
(worker/loading/calibration.py) replaces it once models are loaded.

Formulas for one rank of a replica of n ranks, and a step of R rows of B sequences with C tokens of context each:

    weights  = bytes of the parameters read / memory rate
    products = 2 * parameters read * R / (compute rate * width / (width + half width))
    context  = max(B * C * KV bytes per token / memory rate, 4 * layers * heads/n * head_dim * C * R / compute rate)
    device   = max(weights, products) + context
    traffic  = 2 * layers * latency + layers * (n-1) * sums * R * width * 4 / link rate + gather of the logits
    ramps    = layers * kernels per layer * ramp, and launches = 0: steps run as CUDA graphs
    draws    = reads * R * vocabulary * 4 / memory rate
    host     = constant + B * constant: the engine's thread, while the device waits
    step     = max(device + ramps + traffic + draws, launches) + host

A step reads every weight and every KV entry once; FP8 weights are a byte each and multiply in the dtype of the model.
FP8 KV is a byte a number, and one for the scale of each token and KV head.
A matrix product is a multiply and an add per weight; attention scores and values are two more products over the
context. Each part of `device` is a roofline (Williams, Waterman, Patterson 2009). Narrow products leave tensor cores
idle: a model of `half width` achieves half the rate of a wide one. In a CUDA graph every kernel starts and ends with
most of the device idle (ramps). Ranks exchange float32 sums twice a layer, and each reads those of all others
(engine/shards). `sums` counts those that a rank sends for both products, by the kernels' own rule
(engine/gpu/product_parts.py).

Models that our kernels don't hold are split by transformers. Then

    traffic  = (2 * layers + 1) * ring(R * width * size) + gather of the logits
    launches = layers * kernels per layer * launch, and ramps = 0

where ring(S) = latency + 2 (n-1)/n * S / link rate is the time of an all-reduce (Patarasuk, Yuan 2009; the factor of
nccl-tests' PERFORMANCE.md): a layer has two (Megatron-LM, Shoeybi et al. 2019) and the embedding one. Launches run
ahead of the device, so the slower of the two counts.

If every draft token is accepted with probability p, a chain of d nodes yields (1 - p^(d+1)) / (1 - p) tokens per step
(Leviathan et al. 2023, equation 1), for d steps of the draft and one target step with d + 1 rows per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.engine.gpu.product_parts import parts_of_inputs
from worker.planning.devices import (
    COLLECTIVE_S,
    DRAW_READS,
    EXCHANGE_S,
    FLOPS_SHARE,
    FUSED_KERNELS_PER_LAYER,
    HALF_WIDTH,
    HOST_ROW_S,
    HOST_S,
    KERNELS_PER_LAYER,
    LAUNCH_S,
    MEMORY_SHARE,
    RAMP_S,
    Device,
)
from worker.planning.shapes import ModelShape

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Machine:
    """Device of a replica, and how it holds weights."""

    device: Device
    dtype: str
    fp8: bool = False  # linear layers have FP8 weights, with a float32 scale for each column
    fp8_kv: bool = False  # keys and values are FP8, with a byte for the scale of each token and KV head

    @property
    def dtype_bytes(self) -> int:
        """Bytes per number of what is not FP8."""
        return DTYPE_BYTES[self.dtype]

    def weights_bytes(self, shape: ModelShape, ranks: int) -> int:
        """Return the bytes of a model's weights on each of `ranks` ranks; FP8 weights are on one."""
        return shape.rank_parameters(ranks) * self.dtype_bytes - self._saved_bytes(shape, ranks)

    def read_bytes(self, shape: ModelShape, ranks: int) -> int:
        """Return the bytes of weights that a step reads on each of `ranks` ranks."""
        return shape.read_parameters(ranks) * self.dtype_bytes - self._saved_bytes(shape, ranks)

    def kv_bytes(self, shape: ModelShape, ranks: int) -> int:
        """Return the bytes of keys and values of one token on each of `ranks` ranks."""
        numbers = shape.kv_entries(ranks)
        return numbers + numbers // shape.head_dim if self.fp8_kv else numbers * self.dtype_bytes

    def _saved_bytes(self, shape: ModelShape, ranks: int) -> int:
        fp8 = ranks == 1 and (self.fp8 or shape.has_fp8_weights)
        return shape.fp8_parameters * (self.dtype_bytes - 1) - shape.fp8_columns * 4 if fp8 else 0


@dataclass(frozen=True, slots=True)
class Step:
    """The parts of a step, in milliseconds."""

    weights_ms: float  # reading the weights
    products_ms: float  # matrix products with the weights
    context_ms: float  # attention
    traffic_ms: float  # exchanges between ranks
    ramp_ms: float  # start and end of dependent kernels in a CUDA graph
    draws_ms: float  # drawing tokens from float32 logits
    launch_ms: float  # kernel launches without a CUDA graph
    host_ms: float  # host work before and after the kernels

    @property
    def step_ms(self) -> float:
        """Wall time of the step."""
        device_ms = max(self.weights_ms, self.products_ms) + self.context_ms
        return max(device_ms + self.ramp_ms + self.traffic_ms + self.draws_ms, self.launch_ms) + self.host_ms


@dataclass(frozen=True, slots=True)
class Speculation:
    """The most profitable depth of a draft chain."""

    depth: int  # 0: plain decoding is faster
    tokens_per_step: float
    step_ms: float  # drafting and verifying


def step(shape: ModelShape, machine: Machine, ranks: int, sequences: int, rows: int, context: int) -> Step:
    """Return the parts of a step with `rows` rows in total, over `sequences` sequences of `context` tokens each."""
    device, captured = machine.device, ranks == 1 or shape.splits_exactly
    read = shape.read_parameters(ranks)
    bytes_per_s, flops = device.bytes_per_s * MEMORY_SHARE, device.flops[machine.dtype] * FLOPS_SHARE
    attention_flops = 4 * shape.layers * shape.heads // ranks * shape.head_dim * context * rows
    kv_bytes = sequences * context * machine.kv_bytes(shape, ranks)
    traffic_s = _sums_s(shape, machine, ranks, rows) + _gather_s(rows * shape.vocabulary * 4, device, ranks)
    return Step(
        weights_ms=1e3 * machine.read_bytes(shape, ranks) / bytes_per_s,
        products_ms=1e3 * 2 * read * rows / (flops * shape.width / (shape.width + HALF_WIDTH)),
        context_ms=1e3 * max(kv_bytes / bytes_per_s, attention_flops / flops),
        traffic_ms=1e3 * traffic_s,
        ramp_ms=1e3 * shape.layers * FUSED_KERNELS_PER_LAYER * RAMP_S if captured else 0.0,
        launch_ms=0.0 if captured else 1e3 * shape.layers * KERNELS_PER_LAYER * LAUNCH_S,
        draws_ms=1e3 * DRAW_READS * rows * shape.vocabulary * 4 / bytes_per_s,
        host_ms=1e3 * (HOST_S + sequences * HOST_ROW_S),
    )


def speculate(
    target: ModelShape,
    draft: ModelShape,
    machine: Machine,
    *,
    ranks: int,
    draft_ranks: int,
    sequences: int,
    context: int,
    acceptance: float,
    max_depth: int,
) -> Speculation:
    """Return the draft chain depth with the most tokens per second; 0 if drafting is slower."""
    layer_ms = step(draft, machine, draft_ranks, sequences, sequences, context).step_ms
    return max(
        (
            Speculation(
                depth,
                sum(acceptance**length for length in range(depth + 1)),
                step(target, machine, ranks, sequences, sequences * (depth + 1), context).step_ms + depth * layer_ms,
            )
            for depth in range(max_depth + 1)
        ),
        key=lambda choice: choice.tokens_per_step / choice.step_ms,
    )


def _sums_s(shape: ModelShape, machine: Machine, ranks: int, rows: int) -> float:
    """Return the seconds in which ranks share the sums of a step."""
    if ranks == 1:
        return 0.0
    if not shape.splits_exactly:
        return (2 * shape.layers + 1) * _all_reduce_s(rows * shape.width * machine.dtype_bytes, machine.device, ranks)
    read = (ranks - 1) * sums_sent(shape, ranks, rows) * rows * shape.width * 4
    return shape.layers * (2 * EXCHANGE_S + read / machine.device.link_bytes_per_s)


def sums_sent(shape: ModelShape, ranks: int, rows: int) -> int:
    """Return the sums that a rank sends in a layer: those of the products behind attention and gated columns."""
    inputs = (shape.heads * shape.head_dim, shape.inner)
    return sum(parts_of_inputs(shape.width, count // ranks, shape.parts, ranks).sums(rows) for count in inputs)


def _all_reduce_s(size: float, device: Device, ranks: int) -> float:
    return COLLECTIVE_S + 2 * (ranks - 1) / ranks * size / device.link_bytes_per_s


def _gather_s(size: float, device: Device, ranks: int) -> float:
    if ranks == 1:
        return 0.0
    return COLLECTIVE_S + (ranks - 1) / ranks * size / device.link_bytes_per_s
