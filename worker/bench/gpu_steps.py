"""Measure step times of the paged forward on random weights, next to the hardware's floor and `basic plan`.

    python -m worker.bench.gpu_steps --model DeepSeek-R1-Distill-Qwen-32B

Reads no weights; weights and KV blocks hold random data. Uses the GPU if there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from worker.engine.errors import ModelRefused
from worker.engine.model.architecture import kv_bytes_per_token, shard_of, tp_sizes
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import fuse_layers, uses_paged_kv
from worker.engine.model.loading import native_dtype
from worker.engine.model.packed_model import PackedModel
from worker.engine.model.sharding import as_shard, shard_config
from worker.engine.paged.attention import GPU_BLOCK
from worker.engine.paged.kv import PagedKv
from worker.engine.segments import Segment, chain
from worker.engine.shards.exchange import PeerSums
from worker.engine.shards.shard import Shard, parts_of
from worker.planning.devices import DEVICES, Device
from worker.planning.forecast import Machine, step, sums_sent
from worker.planning.shapes import ModelShape, load_config
from worker.planning.shapes import shape_from_config as shape_from

ROWS = (1, 8, 32, 64, 128, 256)
TREE_ROWS = 16  # rows of one draft tree, root included
_MOST_ROWS, _MOST_SUMS = 1024, 2  # of a step, and of a rank in an exchange
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True, slots=True)
class StepTime:
    """Measured time of steps with this many rows, next to the memory-traffic floor."""

    rows: int
    sequences: int
    trees: bool  # True: draft trees of several rows per sequence; else one row per sequence
    longest: int  # context tokens of the first sequence; the others have those of the command
    step_ms: float  # median, host time included
    floor_ms: float  # the larger one of memory traffic (weights once, KV once per sequence) and arithmetic

    @property
    def times_floor(self) -> float:
        """Step time as a multiple of the floor."""
        return self.step_ms / self.floor_ms


def random_model(config: PretrainedConfig, layers: int | None, device: torch.device) -> PreTrainedModel:
    """Return a model with random weights; `layers` replaces the number of layers."""
    _shorten(config, layers)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=native_dtype(device), attn_implementation=ATTENTION_NAME
        ).eval()
    return model


def _shorten(config: PretrainedConfig, layers: int | None) -> None:
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]


class ExchangeKind(StrEnum):
    """How the first rank of a split model gets the sums of the others, which are on the same device here."""

    NONE = "none"  # it does not: the time of its own work
    PEERS = "peers"  # it reads them in place, without flags
    GATHERED = "gathered"  # it copies them together, as NCCL does, and reads the copy


class OneDeviceExchange:
    """The exchange of the first rank with others whose sums are zeros on its own device."""

    rank = 0

    def __init__(self, ranks: int, kind: ExchangeKind, columns: int, device: torch.device) -> None:
        self.ranks, self._kind = ranks, kind
        self._sums = torch.zeros(ranks, _MOST_SUMS * _MOST_ROWS * columns, device=device)
        self._addresses = torch.tensor([own.data_ptr() for own in self._sums], device=device)

    def room_for_sums(self, sums: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return memory for the sums of this rank."""
        return self._sums[0, : sums * rows * columns].view(sums, rows, columns)

    def sums_of_all(self, own: Tensor) -> Tensor | PeerSums:
        """Return the sums of all ranks, or of this one."""
        if self._kind is ExchangeKind.PEERS:
            return PeerSums(self._addresses, len(own), self.rank)
        if self._kind is ExchangeKind.NONE:
            return own
        return self._sums[:, : own.numel()].reshape(-1, *own.shape[1:])

    def all_gather(self, out: Tensor, own: Tensor) -> None:
        """Fill `out` with the numbers of this rank."""
        out.view(self.ranks, -1).copy_(own)

    def gather(self, own: Tensor) -> list[Tensor] | None:
        """Return the numbers of this rank as those of all."""
        return [own] * self.ranks


def random_shard(config: PretrainedConfig, ranks: int, kind: ExchangeKind, device: torch.device) -> PreTrainedModel:
    """Return the first rank's shard of a model of this configuration, with random weights."""
    parts, own = parts_of(config.num_attention_heads, config.num_key_value_heads), shard_config(config, ranks)
    own.tie_word_embeddings = False  # a rank has its own columns of the output layer
    model = random_model(own, None, device)
    as_shard(model, Shard(parts, OneDeviceExchange(ranks, kind, config.hidden_size, device)))
    return model


def copy_bytes_per_ms(device: torch.device) -> float:
    """Return the bytes per ms that this device reads and writes in a large copy."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = min(_times(lambda: target.copy_(source), 5, device))
    return 2 * source.numel() / fastest


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a step on a device."""

    weight_bytes: int  # read by each step
    token_bytes: int  # of keys and values
    bytes_per_ms: float
    flops_per_ms: float  # of matrix products; inf: unknown

    def ms(self, rows: int, entries: int, itemsize: int) -> float:
        """Return the ms of a step of `rows` rows whose sequences have `entries` KV entries together."""
        traffic_ms = (self.weight_bytes + entries * self.token_bytes) / self.bytes_per_ms
        return max(traffic_ms, 2 * self.weight_bytes / itemsize * rows / self.flops_per_ms)


def floor_of(model: PreTrainedModel, device: Device | None) -> Floor:
    """Return the floor of a model on its device, at the measured rate of a copy and the data sheet's FLOP/s."""
    dtype = str(model.dtype).removeprefix("torch.")
    flops_per_ms = device.flops[dtype] / 1e3 if device else math.inf
    speed = copy_bytes_per_ms(model.device)
    return Floor(_weight_bytes(model), kv_bytes_per_token(model), speed, flops_per_ms)


def measure(
    model: PreTrainedModel,
    floor: Floor,
    rows: tuple[int, ...] = ROWS,
    context: int = 512,
    rounds: int = 20,
    long_context: int = 0,
) -> Iterator[StepTime]:
    """Yield step times for each number of rows, without and with trees.

    With `long_context`, yield instead plain steps in which the first sequence has that many context tokens.
    """
    slots, longest = max(rows), long_context or context
    if uses_paged_kv(model):
        fuse_layers(model)
    tokens = (slots - 1) * context + longest + slots * (TREE_ROWS + GPU_BLOCK)
    packed = PackedModel(model, slots=slots, capacity=longest + TREE_ROWS, paged=True, kv_tokens=tokens)
    assert isinstance(packed.kv, PagedKv)
    for slot in range(slots):
        packed.kv.reserve(slot, 0, context if slot else longest)
    for count in rows:
        for trees in (False,) if long_context or count == 1 else (False, True):
            segments = _trees(count, context) if trees else _plain(count, context, longest)
            entries = (len(segments) - 1) * context + longest + count
            times = _times(lambda step=segments: packed.forward(step), rounds, model.device)
            floor_ms = floor.ms(count, entries, model.dtype.itemsize)
            yield StepTime(count, len(segments), trees, longest, median(times), floor_ms)


def _times(work: Any, rounds: int, device: torch.device) -> list[float]:
    """Return the milliseconds of each round, after one warm-up round."""
    times = []
    for _ in range(rounds + 1):
        started = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((perf_counter() - started) * 1e3)
    return times[1:]


def _weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of weights that a step reads: all but input embeddings that are not tied to the output."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    size, whole, ranks = embedding.element_size(), len(embedding), shard_of(model).ranks
    others = whole - math.ceil(whole / ranks)  # columns of the output layer
    tied = model.config.tie_word_embeddings
    return int(total - others * embedding.shape[1] * size - (0 if tied else embedding.numel() * size))


def _plain(rows: int, context: int, longest: int) -> list[Segment]:
    return [chain(slot, context if slot else longest, [1], keep_last=True) for slot in range(rows)]


def _trees(rows: int, context: int) -> list[Segment]:
    return [_tree(slot, min(TREE_ROWS, rows - at), context) for slot, at in enumerate(range(0, rows, TREE_ROWS))]


def _tree(slot: int, rows: int, context: int) -> Segment:
    """Return a binary tree of `rows` rows after a context."""
    visible = np.eye(rows, dtype=np.bool_)
    for node in range(1, rows):
        visible[node] |= visible[(node - 1) // 2]
    depth = visible.sum(axis=1) - 1
    return Segment(slot, context, context, np.ones(rows, np.int64), context + depth, visible, np.arange(rows))


def forecast_ms(shape: ModelShape, machine: Machine, ranks: int, time: StepTime, context: int) -> float:
    """Return the step time that `basic plan` forecasts, in ms, exchanges included."""
    return step(shape, machine, ranks, time.sequences, time.rows, context).step_ms


def exchange_floor_ms(shape: ModelShape, device: Device, ranks: int, rows: int) -> float:
    """Return the ms in which a rank reads the sums of the others at the link rate of the data sheet."""
    read = shape.layers * (ranks - 1) * sums_sent(shape, ranks, rows) * rows * shape.width * 4
    return 1e3 * read / device.link_bytes_per_s


def main(
    model: Annotated[
        str, typer.Option(help="Packaged name, directory with a config.json, or hub id; no weights are read.")
    ] = "DeepSeek-R1-Distill-Qwen-1.5B",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers, if not all fit into memory.")] = None,
    rows: Annotated[str, typer.Option(help="Rows per step, comma-separated.")] = ",".join(map(str, ROWS)),
    context: Annotated[int, typer.Option(min=1, help="Context tokens of each sequence.")] = 512,
    long_context: Annotated[
        int, typer.Option(min=0, help="Context tokens of the first sequence: one long text among short ones.")
    ] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps per line.")] = 20,
    ranks: Annotated[
        int, typer.Option(min=1, help="Measure the first rank's share of a model split over this many ranks.")
    ] = 1,
    exchange: Annotated[
        str,
        typer.Option(
            help="How it gets the sums of the others, which are on the same GPU here, comma-separated: none, peers, "
            "gathered."
        ),
    ] = "peers",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Measure step times with random weights of a model's shape.

    Example: python -m worker.bench.gpu_steps --layers 16 --rows 64 --context 800 --long-context 32000
    """
    try:
        counts = tuple(int(part) for part in rows.split(","))
    except ValueError:
        raise typer.BadParameter("--rows must be integers, comma-separated") from None
    try:
        kinds = [ExchangeKind(part) for part in exchange.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--exchange must be of {', '.join(ExchangeKind)}, comma-separated") from None
    if not 1 <= min(counts) <= max(counts) <= _MOST_ROWS:
        raise typer.BadParameter(f"--rows must be at least 1 and at most {_MOST_ROWS}")
    try:
        config = load_config(model)
    except ModelRefused as refusal:
        raise typer.BadParameter(str(refusal)) from None
    if ranks not in tp_sizes(config):
        raise typer.BadParameter(f"--ranks must be one of {', '.join(map(str, tp_sizes(config)))}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _shorten(config, layers)
    shape = shape_from(model, config)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    known = next((known for known in DEVICES.values() if known.name in name.lower()), None)
    for kind in kinds if ranks > 1 else kinds[:1]:
        network = random_model(config, None, device) if ranks == 1 else random_shard(config, ranks, kind, device)
        dtype = str(network.dtype).removeprefix("torch.")
        table = Table("rows", "sequences", "step ms", "floor ms", "times floor", "plan ms", "plan / step")
        before = f"{context} tokens before" + (f", {long_context} before the first" if long_context else "")
        share = f"one of {ranks} shares, exchange {kind}, of " if ranks > 1 else ""
        table.title = f"{share}{model}, {shape.layers} layers, {dtype}, {before}, {name}"
        for time in measure(network, floor_of(network, known), counts, context, rounds, long_context):
            plan_ms = forecast_ms(shape, Machine(known, dtype), ranks, time, context) if known else None
            if as_json:
                of = {"model": model, "layers": shape.layers, "ranks": ranks, "device": name, "context": context}
                of |= {"exchange": kind.value if ranks > 1 else None, "exchange_floor_ms": None}
                if known is not None and ranks > 1:
                    of["exchange_floor_ms"] = exchange_floor_ms(shape, known, ranks, time.rows)
                of |= {**asdict(time), "times_floor": time.times_floor, "plan_ms": plan_ms}
                print(json.dumps(of), flush=True)
            numbers = [f"{time.step_ms:.2f}", f"{time.floor_ms:.2f}", f"{time.times_floor:.2f}"]
            numbers += [f"{plan_ms:.2f}", f"{plan_ms / time.step_ms:.2f}"] if plan_ms else ["", ""]
            table.add_row(str(time.rows), f"{time.sequences}{' trees' if time.trees else ''}", *numbers)
        if not as_json:
            Console().print(table)


if __name__ == "__main__":
    typer.run(main)
