"""The backend of a model: the KV layout, attention and kernels for its device and dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.cpu.fused_layers import FusedLayers, LayerStack, decoder_layers, fuse
from worker.engine.cpu.kernels import Kernels, kernels
from worker.engine.cpu.kv import CpuKv
from worker.engine.cpu.packed_linear import PackedLinear
from worker.engine.cpu.packing import pack
from worker.engine.gpu.fused_layers import GpuLayers, GpuLinear, fuse_on_gpu
from worker.engine.kv.dense import DenseKv
from worker.engine.kv.fp8 import has_fp8_kv
from worker.engine.kv.store import KvStore
from worker.engine.model.architecture import (
    STORED_HEAD_DIM,
    head_dim_of,
    heads_of,
    is_dealt_by_transformers,
    kv_heads_of,
    latent_dim_of,
    layers_of,
    shard_of,
)
from worker.engine.model.attention import AttentionPlan, DenseAttentionPlan
from worker.engine.model.latent import LatentHeads, pack_latents
from worker.engine.model.offload import MultiDeviceAttentionPlan, MultiDeviceKv, is_offloaded, layer_devices
from worker.engine.paged.attention import GPU_BLOCK, gpu_kernels_for, paged_plan
from worker.engine.paged.cuda_graphs import no_capture
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.shape_buckets import BucketedForward, Run
from worker.engine.segments import Segment
from worker.engine.shards.output_layer import deal_output

_FUSED = (PackedLinear, FusedLayers, GpuLayers, GpuLinear, LatentHeads)
_CPU_BLOCK = 16  # KV entries of a block on a CPU: small enough that the short texts of tests fill several


@dataclass(frozen=True, slots=True)
class Backend:
    """The KV slots of a model, and how a forward attends over them."""

    kv: KvStore
    plan: Callable[[Sequence[Segment]], AttentionPlan]
    kernels: Kernels | None = None  # compiled CPU kernels, if these run the model
    bucketed: Callable[[Run], BucketedForward | None] = lambda _: None  # captures forwards in a few shapes


def make_backend(
    model: PreTrainedModel,
    slots: int,
    capacity: int,
    *,
    cpu_kernels: bool = True,
    paged: bool | None = None,
    kv_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """Return the backend for a model, or for the layers of a draft head.

    The parameters are those of `PackedModel`; `dtype` is that of keys and values, by default the model's, or FP8 if it
    stores them so.
    """
    stored: Any = {"in_fp8": dtype is None and has_fp8_kv(model), "latent_dim": latent_dim_of(model)}
    config, dtype = model.config.get_text_config(), dtype or model.dtype
    heads, kv_heads = heads_of(model), kv_heads_of(model)
    layers, head_dim = layers_of(config), head_dim_of(model)
    if is_offloaded(model):
        parts = MultiDeviceKv(layer_devices(model), slots, kv_heads, capacity, head_dim, dtype)
        return Backend(parts, lambda segments: MultiDeviceAttentionPlan(segments, parts, heads // kv_heads))
    if uses_paged_kv(model) if paged is None else paged:
        size = GPU_BLOCK if model.device.type == "cuda" else _CPU_BLOCK
        group = heads // kv_heads
        shape = (layers, slots, kv_heads, capacity, head_dim)
        pages = PagedKv(*shape, dtype, model.device, block_size=size, tokens=kv_tokens, group=group, **stored)
        capture = no_capture if is_dealt_by_transformers(model) else None  # its sums are no part of a CUDA graph
        return Backend(
            pages,
            lambda segments: paged_plan(segments, pages),
            bucketed=lambda run: BucketedForward(run, pages, capture),
        )
    compiled = kernels_for(model) if cpu_kernels else None
    if compiled is None:
        dense = DenseKv(layers, slots, kv_heads, capacity, head_dim, dtype, model.device, **stored)
        return Backend(dense, lambda segments: DenseAttentionPlan(segments, dense, heads // kv_heads))
    packed = CpuKv(layers, slots, kv_heads, capacity, _stored_head_dim(model, compiled), dtype, compiled, **stored)
    return Backend(packed, lambda segments: CpuAttentionPlan(segments, packed, heads, compiled), compiled)


def uses_paged_kv(model: PreTrainedModel) -> bool:
    """Return whether a model's KV is paged by default: on a GPU, unless the model is offloaded."""
    return model.device.type == "cuda" and not is_offloaded(model)


def stored_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes that a model with fused layers takes, by dtype; scales of quantised weights are float32."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        own = module.stored() if isinstance(module, _FUSED) else module.parameters(recurse=False)
        for tensor in own:
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                counts[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(counts)


def fuse_layers(model: PreTrainedModel) -> None:
    """Replace layers with fused implementations for this processor: the same products, faster."""
    ours = uses_paged_kv(model) and not is_dealt_by_transformers(model)
    on_gpu = gpu_kernels_for(model.device) if ours else None
    if on_gpu is not None:
        fuse_on_gpu(model, on_gpu, shard_of(model))
    compiled = kernels_for(model)
    if compiled is not None:
        stored = _stored_head_dim(model, compiled)
        if stored == head_dim_of(model):
            shard = shard_of(model)
            if fuse(model, compiled, shard) and shard.ranks > 1:
                body: Any = model
                body.lm_head = deal_output(body.lm_head, shard)
        setattr(model, STORED_HEAD_DIM, stored)
        pack_latents(model, compiled)
        pack(model)


def batch_dependence(model: PreTrainedModel) -> str | None:
    """Return why the bits of a text may depend on the other texts of its batch; None if they do not.

    The layers of the model are fused already, where they can be.
    """
    if is_dealt_by_transformers(model):
        exact = model.dtype == torch.float32  # but for ties
        return None if exact else f"transformers splits a {type(model).__name__} over the ranks; see docs/scale.md"
    if is_offloaded(model):
        return "its layers are spread over several devices"
    if model.device.type == "cpu":
        return None if kernels_for(model) is not None else "the kernels of this CPU need a C compiler; install gcc"
    layers = decoder_layers(model)
    if layers is not None and isinstance(layers[0], LayerStack):
        return None
    return f"a {type(model).__name__} runs through transformers' layers on a GPU; see docs/models.md"


def _stored_head_dim(model: PreTrainedModel, compiled: Kernels) -> int:
    """Return the size of a head in slots of the compiled kernels: whole panels."""
    return -(-head_dim_of(model) // compiled.panel) * compiled.panel


def kernels_for(model: PreTrainedModel) -> Kernels | None:
    """Return the compiled CPU kernels, or None if they can't run this model."""
    ours = model.device.type == "cpu" and not is_dealt_by_transformers(model) and not is_offloaded(model)
    return kernels(model.dtype) if ours else None
