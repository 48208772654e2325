"""Memory: how many tokens of keys and values fit beside the loaded models.

Asked once, at start-up, when all weights lie where they stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from jobs.errors import SetupError
from worker.engine.options import EngineOptions

_KV_SHARE = 0.5  # of the free memory; the rest is for activations, the tokenizer, and whoever else lives here


def with_kv_tokens(
    options: EngineOptions,
    chosen: int,
    target_bytes: int,
    draft_bytes: int,
    device: torch.device,
    block_size: int | None = None,
    free: Callable[[torch.device], int] | None = None,
) -> EngineOptions:
    """Return options that fit the memory of a device, of which `free` may know better than we: see `fit`."""
    room = 0 if chosen else (free or free_bytes)(device)
    whole_slots = device.type != "cpu" and not block_size
    return fit(options, chosen, target_bytes, draft_bytes, room, whole_slots=whole_slots, block_size=block_size or 0)


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
    """Return options that fit `free` bytes: `chosen` tokens, or as many as there is room for if that is 0.

    `target_bytes` and `draft_bytes` are what one token takes in the KV of each model; with `whole_slots` the memory of
    a slot is taken at once, and else bit by bit, in blocks of `block_size` tokens where it has blocks. No text may be
    longer than the memory, so a prompt that could never be admitted is refused like any other that is too long. Raises
    SetupError when there is no room for a text at all.
    """
    tokens = chosen or _fitting_tokens(options, target_bytes, draft_bytes, free, block_size)
    tokens = min(tokens, options.max_sequences * options.slot_tokens)
    context = min(options.max_context, tokens - options.nodes - 1)
    if context < 2:
        raise SetupError(
            f"there is room for {max(0, tokens)} tokens of KV memory, less than one text and a tree of {options.nodes} "
            "nodes need; set BASIC_KV_TOKENS or BASIC_NODES, or choose a smaller model"
        )
    options = replace(options, max_context=context, kv_tokens=tokens)
    if not whole_slots:
        return options  # memory of a slot is only taken when it is written
    return replace(options, max_sequences=max(1, min(options.max_sequences, tokens // options.slot_tokens)))


def _fitting_tokens(options: EngineOptions, target_bytes: int, draft_bytes: int, free: int, block_size: int) -> int:
    """Return how many tokens of both models fit; set aside are each sequence's draft tree and half-empty blocks."""
    # The draft keeps every node that it expanded until the walk, the target only the tree it is shown.
    trees = options.max_sequences * options.nodes * (options.max_depth - 1) * draft_bytes
    blocks = options.max_sequences * block_size * (target_bytes + draft_bytes)
    return int((free * _KV_SHARE - trees - blocks) // (target_bytes + draft_bytes))


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_free_of_machine(), _free_of_container())


def available_bytes(device: torch.device, share: float) -> int:
    """Return the memory that this process may count on: all that is free of a GPU, a share of main memory."""
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
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return 1 << 62
