"""Choose an engine's capacity from the settings, the loaded models and the memory they leave free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from worker.engine.kv.fp8 import has_fp8_kv
from worker.engine.model.architecture import (
    batch_dependent_rope,
    has_long_factors,
    kv_bytes_per_token,
    long_text_tokens,
    max_positions,
)
from worker.engine.model.backend import uses_paged_kv
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import MAX_STEP_NODES, EngineOptions, Mode
from worker.engine.paged.attention import GPU_BLOCK
from worker.engine.paged.shape_buckets import BUCKETS, GRAPH_BYTES
from worker.engine.segments import chain
from worker.loading.drafts import DrafterFactory
from worker.loading.memory import (
    CPU_SHARE,
    GPU_SHARE,
    MAX_CPU_SEQUENCES,
    WHOLE_SLOT_CONTEXT,
    KvMemory,
    available_bytes,
    fit,
    peak_bytes,
)
from worker.loading.model_store import OnMessage
from worker.loading.tensor_parallel import RankGroup
from worker.settings import WorkerSettings
from worker.sharing.access import DeviceAccess, SoleAccess

_FORWARD_COPIES = 2  # the largest forward's memory is held twice: by the CUDA graphs, and by steps without a graph


def choose_capacity(
    settings: WorkerSettings,
    model: PreTrainedModel,
    draft: DrafterFactory,
    ranks: RankGroup | None,
    on_message: OnMessage,
    access: DeviceAccess | None = None,
) -> EngineOptions:
    """Return the engine's options; `on_message` takes a sentence about what was chosen.

    `access` divides the memory if other models share the device.
    Raises SetupError if not even one sequence fits.
    """
    # A head's hidden states are allocated per whole slot, so its target's KV memory can't be paged.
    paged = uses_paged_kv(model) and not draft.taps
    whole_slots = model.device.type != "cpu" and not paged
    options = _wanted(settings, model, whole_slots, on_message)
    memory = KvMemory(
        free_bytes=0 if settings.kv_tokens else _free_bytes(settings, model, options, ranks, access),
        share=CPU_SHARE if model.device.type == "cpu" else GPU_SHARE,
        token_bytes=kv_bytes_per_token(model),
        draft_token_bytes=draft.token_bytes,
        page_tokens=GPU_BLOCK if paged else 1,
        whole_slots=whole_slots,
    )
    options = fit(options, settings.kv_tokens, memory, derive_sequences=not settings.max_sequences)
    stored = "FP8" if has_fp8_kv(model) else str(model.dtype).removeprefix("torch.")
    gib = options.total_kv_tokens * (memory.token_bytes + memory.draft_token_bytes) / 2**30
    on_message(
        f"KV cache: {options.total_kv_tokens:,} tokens in {gib:.1f} GiB of {stored}, up to {options.max_sequences:,} "
        f"sequence(s) of up to {options.max_context:,} tokens"
    )
    return options


def _wanted(
    settings: WorkerSettings, model: PreTrainedModel, whole_slots: bool, on_message: OnMessage
) -> EngineOptions:
    """Return the options before memory limits them."""
    device_limit = MAX_CPU_SEQUENCES if model.device.type == "cpu" else BUCKETS[-1]
    return EngineOptions(
        mode=Mode(settings.mode),
        max_sequences=settings.max_sequences or device_limit,
        max_context=_context(settings, model.config.get_text_config(), whole_slots, on_message),
        prefill_rows=settings.prefill_rows,
        nodes=settings.nodes,
        threshold=settings.threshold,
        max_depth=settings.max_depth,
    )


def _context(settings: WorkerSettings, config: PretrainedConfig, whole_slots: bool, on_message: OnMessage) -> int:
    """Return the maximum context in tokens; report it if rotary embeddings limit it below the settings."""
    positions, kind = max_positions(config), batch_dependent_rope(config)
    default = WHOLE_SLOT_CONTEXT if whole_slots or positions is None else positions
    wanted = settings.max_context or default
    if has_long_factors(config):
        on_message(
            f"The longrope rotary embeddings of {settings.target} use their long factors for texts of any length, "
            "because BASIC_MAX_CONTEXT is beyond their original positions; with a smaller one, texts are others"
        )
    elif long_text_tokens(config) is not None:
        on_message(
            f"Texts of {settings.target} with more than {long_text_tokens(config):,} tokens, prompt and max_tokens "
            "together, have the long factors of its longrope rotary embeddings from their first token; others the short"
        )
    elif kind and (wanted > (positions or wanted) or not settings.max_context):
        more = "; set BASIC_MAX_CONTEXT to more for their long factors" if kind == "longrope" else ""
        on_message(
            f"The context is limited to {positions} tokens: beyond them the {kind} rotary embeddings of "
            f"{settings.target} depend on the other sequences of a batch{more}"
        )
    return wanted if positions is None else min(wanted, positions)


def _free_bytes(
    settings: WorkerSettings,
    model: PreTrainedModel,
    options: EngineOptions,
    ranks: RankGroup | None,
    access: DeviceAccess | None,
) -> int:
    """Return the bytes that weights and the largest forward leave free, on the rank with the least."""

    def own() -> int:
        return bytes_left(model, options, settings.memory_share / settings.tp, access)

    return own() if ranks is None else ranks.min_free_bytes(options, own)


def bytes_left(model: PreTrainedModel, options: EngineOptions, share: float, access: DeviceAccess | None = None) -> int:
    """Return the bytes that weights and the largest forward leave free on this process's device.

    On a CPU they are a `share` of free main memory. On a GPU the forward runs, so all ranks of a model must call it.
    `access` divides them if other models share the device.
    """
    forward_bytes = 0
    if model.device.type == "cuda":
        forward_bytes = peak_bytes(model.device, largest_forward(model, options))
        forward_bytes = _FORWARD_COPIES * forward_bytes + GRAPH_BYTES
    return (access or SoleAccess()).memory_budget(lambda: available_bytes(model.device, share)) - forward_bytes


def largest_forward(model: PreTrainedModel, options: EngineOptions) -> Callable[[], Tensor]:
    """Return a function that runs the largest forward of a step: all its prompt rows, draft nodes and roots.

    It returns the logits [draft nodes + roots, vocab]. Its KV memory is allocated before it runs.
    """
    kept = options.max_sequences + MAX_STEP_NODES
    rows = chain(0, 0, [0] * (options.prefill_rows + kept), keep_last=True)
    positions = np.minimum(rows.positions, options.max_context - 1)
    segment = replace(rows, positions=positions, keep=np.arange(kept))
    packed = PackedModel(model, slots=1, capacity=len(rows.ids), verifies=False)
    return lambda: packed.forward([segment])
