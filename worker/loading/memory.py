"""Compute how many KV tokens fit beside the loaded models. Runs once at start-up, after all weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from jobs.errors import SetupError
from worker.engine.options import EngineOptions

_KV_SHARE = 0.5  # of the free memory; the rest is for activations, the tokenizer and other processes


def with_kv_tokens(
    options: EngineOptions,
    chosen: int,
    target_bytes: int,
    draft_bytes: int,
    device: torch.device,
    block_size: int | None = None,
    free: Callable[[torch.device], int] | None = None,
) -> EngineOptions:
    """Return options that fit the memory of a device, see `fit`; `free` measures it (default: `free_bytes`)."""
    free_memory = 0 if chosen else (free or free_bytes)(device)
    whole_slots = device.type != "cpu" and not block_size
    return fit(
        options, chosen, target_bytes, draft_bytes, free_memory, whole_slots=whole_slots, block_size=block_size or 0
    )


def fit(
    options: EngineOptions,
    chosen: int,
    target_bytes: int,
    draft_bytes: int,
    free: int,
    *,
    whole_slots: bool,
    block_size: int = 0,
) -> EngineOptions:
    """Return options with `chosen` KV tokens, or as many as fit `free` bytes if that is 0.

    `target_bytes` and `draft_bytes` are the KV bytes per token of each model. With `whole_slots` a slot's memory is
    allocated at once; else it grows with its sequence, in blocks of `block_size` tokens if that is not 0. `max_context`
    shrinks to the memory, so a prompt that could never be admitted is rejected as too long. Raises SetupError if not
    even one sequence fits.
    """
    tokens = chosen or _fitting_tokens(options, target_bytes, draft_bytes, free, block_size)
    tokens = min(tokens, options.max_sequences * options.slot_tokens)
    context = min(options.max_context, tokens - options.nodes - 1)
    if context < 2:
        raise SetupError(
            f"the memory holds {max(0, tokens)} KV tokens, too few for one sequence and a tree of {options.nodes} "
            "nodes; set BASIC_KV_TOKENS or BASIC_NODES, or choose a smaller model"
        )
    options = replace(options, max_context=context, kv_tokens=tokens)
    if not whole_slots:
        return options  # a slot takes memory only as it is written
    return replace(options, max_sequences=max(1, min(options.max_sequences, tokens // options.slot_tokens)))


def _fitting_tokens(options: EngineOptions, target_bytes: int, draft_bytes: int, free: int, block_size: int) -> int:
    """Return how many KV tokens of both models fit beside each sequence's draft tree and one partly filled block."""
    # The draft holds every node it expanded until verification; the target holds only the tree it verifies.
    trees = options.max_sequences * options.nodes * (options.max_depth - 1) * draft_bytes
    blocks = options.max_sequences * block_size * (target_bytes + draft_bytes)
    return int((free * _KV_SHARE - trees - blocks) // (target_bytes + draft_bytes))


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes."""
    if device.type == "cuda":
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
