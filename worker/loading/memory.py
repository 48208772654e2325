"""Compute how many KV tokens, sequences and context tokens fit beside the loaded models. Runs once at start-up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.errors import SetupError
from worker.engine.errors import ModelRefused
from worker.engine.model.checkpoint import folder_of, weight_files
from worker.engine.options import MAX_STEP_NODES, EngineOptions
from worker.engine.quantization.weights import QuantizationMethod

GPU_SHARE = 0.92  # of what the weights and the largest forward leave free; the rest: library workspaces, fragmentation
CPU_SHARE = 0.5  # of free main memory, so that the machine stays usable
WHOLE_SLOT_CONTEXT = 4096  # default tokens of a context where every slot takes the memory of a full one
MAX_CPU_SEQUENCES = 64  # more rows a step gain nothing on a CPU: its products are bound by arithmetic from about 32 on
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its format
_MIN_SEQUENCE_TOKENS = 256  # of KV memory per sequence where the number of sequences is derived from it


@dataclass(frozen=True, slots=True)
class KvMemory:
    """The memory of a device for KV, and how its stores allocate it."""

    free_bytes: int  # free once the weights are loaded
    share: float  # of them that KV may take
    token_bytes: int  # KV bytes per token of the target
    draft_token_bytes: int = 0  # of the draft; 0: it has none
    page_tokens: int = 1  # tokens that are allocated at once
    whole_slots: bool = False  # a slot's memory is allocated at once

    def fitting_tokens(self, options: EngineOptions) -> int:
        """Return how many KV tokens of both models fit beside the draft nodes of one step.

        The draft holds every node that it expanded until verification; the target only the nodes that it verifies.
        """
        both = self.token_bytes + self.draft_token_bytes
        trees = MAX_STEP_NODES * (self.token_bytes + (options.max_depth - 1) * self.draft_token_bytes)
        return int((self.free_bytes * self.share - trees) // both)


def fit(
    options: EngineOptions, chosen_tokens: int, memory: KvMemory, *, derive_sequences: bool = False
) -> EngineOptions:
    """Return options with `chosen_tokens` KV tokens, or as many as fit the memory if that is 0.

    `max_context` shrinks to the memory, so that a prompt that could never be admitted is refused as too long. With
    `derive_sequences`, `max_sequences` is an upper limit that shrinks to what the memory is likely to hold. Raises
    SetupError if not even one sequence fits.
    """
    page = memory.page_tokens
    every_slot = options.max_sequences * -(-options.slot_tokens // page) * page
    tokens = min(chosen_tokens or memory.fitting_tokens(options), every_slot) // page * page
    context = min(options.max_context, tokens - options.nodes - 1)
    if context < 2:
        raise SetupError(
            f"the memory holds {max(0, tokens)} KV tokens, too few for one sequence and a tree of {options.nodes} "
            "nodes; set BASIC_KV_TOKENS or BASIC_NODES, or choose a smaller model"
        )
    options = replace(options, max_context=context, kv_tokens=tokens, page_tokens=page)
    if memory.whole_slots:
        return _with_sequences(options, tokens // options.slot_tokens)
    return _with_sequences(options, tokens // _MIN_SEQUENCE_TOKENS) if derive_sequences else options


def _with_sequences(options: EngineOptions, limit: int) -> EngineOptions:
    return replace(options, max_sequences=max(1, min(options.max_sequences, limit)))


def least_weight_bytes(paths: Iterable[str | None], dtype: torch.dtype, quantization: QuantizationMethod | None) -> int:
    """Return the bytes that the weights of models and drafts take at least, as far as they are on this machine.

    Reads the headers of their files. A number takes the size of `dtype`, or a byte where the file has it in a byte or
    where `quantization` may round it.
    """
    size = 0
    for folder in filter(None, (folder_of(path) for path in paths if path)):
        for file in _weight_files(folder):
            for tensor in _header(file):
                byte = "8" in tensor["dtype"] or (quantization is not None and len(tensor["shape"]) > 1)
                size += math.prod(tensor["shape"]) * (1 if byte else dtype.itemsize)
    return size


def _header(file: Path) -> list[dict[str, Any]]:
    """Return what a safetensors file says of its tensors; nothing if it is damaged, which its load will say."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(min(length, _MAX_HEADER_BYTES)))
            return [tensor for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError):
            return []


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model, or of a head, which has no index."""
    try:
        return weight_files(folder)
    except ModelRefused:
        return sorted(folder.glob("*.safetensors"))


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Return the memory in bytes that `run` takes on a GPU beyond what is allocated before it."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return int(peak - before)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory that torch holds for reuse is free
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_free_of_machine(), _free_of_container())


def available_bytes(device: torch.device, share: float) -> int:
    """Return the bytes that this process may use: all free memory of a GPU, or a `share` of free main memory."""
    return int(free_bytes(device) * (1.0 if device.type == "cuda" else share))


def _free_of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return 4 << 30
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _free_of_container() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return 1 << 62
