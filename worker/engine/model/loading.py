"""Load transformers models for packed decoding, and read the weights that draft heads share with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from worker.engine.attention_options import AttentionOptions
from worker.engine.errors import ModelRefused
from worker.engine.model.architecture import (
    ATTENTION_SHAPE,
    AttentionShape,
    head_dim_of,
    is_dealt_by_transformers,
    kv_heads_of,
    max_positions,
    refuse_tp_size,
    refuse_unsupported,
    use_long_factors,
)
from worker.engine.model.attention import ATTENTION_NAME, KV_SHAPE, WINDOW_OF_CONFIG, AttentionPlan
from worker.engine.model.backend import Backend, make_backend
from worker.engine.model.checkpoint import (
    as_model_refused,
    refuse_incomplete,
    refuse_unfit,
    refuse_unreadable,
    weight_files,
)
from worker.engine.model.equivalence_check import (
    ATTRIBUTE,
    CHECK_ENTRIES,
    EquivalenceCheck,
    build_check,
    sliding_layers,
)
from worker.engine.model.latent import LATENT, hold_latents
from worker.engine.model.long_texts import use_factors_by_text
from worker.engine.model.offload import OffloadOptions, is_offloaded
from worker.engine.model.packed_model import run_layers
from worker.engine.model.quantized_checkpoint import refuse_quantized
from worker.engine.model.sharding import as_shard, read_shard, shard_config, shard_for, splits_exactly
from worker.engine.quantization.activations import ActivationScheme
from worker.engine.quantization.checkpoints import attach_all, declared_activations, is_fp8, read_fp8
from worker.engine.quantization.weights import QuantizationMethod, quantization_method, quantize
from worker.engine.segments import Segment, chain
from worker.engine.shards.exchange import Exchange
from worker.engine.shards.shard import Shard
from worker.engine.shards.symmetric_memory import exchange_on

_QUANTIZED = "quantization_config"  # attribute of a configuration
_GATHERED = (
    "basic_gathered_weights"  # attribute of a tensor parallel model: its weights that `gather_embeddings` collected
)


def local_folder(path: str) -> Path:
    """Return the directory of a model, of a hub id the one in the hub's cache, into which it is downloaded."""
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(path))


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the hardware computes in it, else float32."""
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load(
    path: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    ranks: int = 1,
    offload: OffloadOptions | None = None,
    quantization: QuantizationMethod | None = None,
    exchange: Exchange | None = None,
    context: int = 0,
    factors_by_text: bool = False,
) -> PreTrainedModel:
    """Load a causal model from a local directory or a hub id; safetensors only, no remote code.

    With `ranks` above 1, load this process's shard: for our own kernels if they hold the model, whose ranks then share
    numbers by `exchange` (None: the fastest that they have), else by the tensor parallel plan that transformers has.
    With `offload`, accelerate lays the model out over all devices. With `quantization`, round the weights of linear
    layers; a checkpoint with FP8 weights keeps them, and rounds its rows as it declares, unless FP8 (rows keep `dtype`)
    or FP8_DYNAMIC is given. With `factors_by_text`, texts choose the factors of longrope (`PackedModel.mark_long`);
    else a `context` in tokens beyond the original positions lets the long factors hold for all texts. Raises
    ModelRefused, with what to do, if the model is missing, damaged or not supported.
    """
    with as_model_refused(f"{path} could not be loaded", ranks=ranks):
        refuse_quantized(path)
        refuse_unreadable(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        refuse_unfit(path, config)
        refuse_unsupported(config.get_text_config())
        refuse_tp_size(config.get_text_config(), ranks)
        long = not factors_by_text and use_long_factors(config.get_text_config(), context)
        given = {"config": config} if long else {}
        stored = _fp8_config(config)
        if stored is not None:
            _refuse_fp8_parts(path, ranks, offload, quantization)
            model = _load_fp8(path, config, dtype, _activations(stored, quantization))
        elif ranks > 1 and offload is None and splits_exactly(config, ranks, dtype, device):
            shared = exchange or exchange_on(device, config.hidden_size)
            model = _load_shard(path, config, dtype, shard_for(config, shared))
        else:
            model = _load_weights(path, dtype, ranks, offload, **given)
        if quantization is not None and quantization_method(model) is None:
            quantize(model, quantization)
        if not is_offloaded(model):
            model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to as its types don't say
        model.eval()  # type: ignore[no-untyped-call]
        if factors_by_text:
            use_factors_by_text(model)
        if not is_dealt_by_transformers(model):
            if not is_offloaded(model):
                hold_latents(model)
            _note_attention(model)
        setattr(model, ATTRIBUTE, _equivalence_check(model))
        return model


def _fp8_config(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return the quantisation that a configuration declares if its weights are FP8."""
    found = (getattr(part, _QUANTIZED, None) or {} for part in (config, config.get_text_config()))
    return next((given for given in found if is_fp8(given)), None)


def _activations(stored: Mapping[str, Any], wanted: QuantizationMethod | None) -> ActivationScheme | None:
    """Return the scheme of the rows of an FP8 checkpoint: as it declares, unless a method is wanted."""
    if wanted is QuantizationMethod.FP8:
        return None
    declared = declared_activations(stored)
    dynamic = declared is not None and declared.static_scale is None
    return ActivationScheme() if wanted is QuantizationMethod.FP8_DYNAMIC and not dynamic else declared


def _refuse_fp8_parts(
    path: str, ranks: int, offload: OffloadOptions | None, quantization: QuantizationMethod | None
) -> None:
    """Raise ModelRefused for what a checkpoint with FP8 weights can't be combined with."""
    if ranks > 1 or offload is not None:
        raise ModelRefused(
            f"{path} has FP8 weights, which one device holds whole; start with --tp 1 and without BASIC_DEVICE_MAP, or "
            "choose the model in bfloat16"
        )
    if quantization is not None and quantization.is_int8:
        raise ModelRefused(
            f"{path} has FP8 weights, which can't be rounded to {quantization}; leave BASIC_QUANTIZATION unset, or "
            "choose the model in bfloat16"
        )


def _load_fp8(
    path: str, config: PretrainedConfig, dtype: torch.dtype, activations: ActivationScheme | None
) -> PreTrainedModel:
    """Load a checkpoint with FP8 weights."""
    weights, stored = read_fp8(weight_files(local_folder(path)), dtype, activations)
    for part in (config, config.get_text_config()):
        if hasattr(part, _QUANTIZED):
            delattr(part, _QUANTIZED)
    with torch.device("meta"):
        shell: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model = _load_weights(path, dtype, 1, None, type(shell), config=shell.config, state_dict=weights)
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(path)
    attach_all(model, stored)
    return model


def _load_shard(path: str, config: PretrainedConfig, dtype: torch.dtype, shard: Shard) -> PreTrainedModel:
    """Load this rank's shard of a model."""
    weights = read_shard(weight_files(local_folder(path)), shard, dtype)
    own = shard_config(config, shard.ranks)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(own))  # type: ignore[no-untyped-call]
    model = _load_weights(path, dtype, 1, None, kind, config=own, state_dict=weights)
    with suppress(OSError):  # it has none
        model.generation_config = GenerationConfig.from_pretrained(path)
    as_shard(model, shard)
    return model


def _load_weights(
    path: str,
    dtype: torch.dtype,
    ranks: int,
    offload: OffloadOptions | None,
    kind: Any = AutoModelForCausalLM,
    **given: Any,
) -> PreTrainedModel:
    """Load with transformers; raises ModelRefused unless the checkpoint has exactly the model's weights.

    `given` may have the `config` of a `kind` of model, and a `state_dict` to load instead of the files.
    """
    try:
        with _quiet_transformers():
            loaded: Any = kind.from_pretrained(
                None if "state_dict" in given else path,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                distributed_config=DistributedConfig(tp_size=ranks) if ranks > 1 else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refuse_incomplete names them
                **(offload.options() if offload else {}),
                **given,
            )
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise
        raise ModelRefused(
            f"{path} computes attention by itself and not by transformers' attention interface, which packed decoding "
            "needs; choose another model"
        ) from error
    model, info = loaded
    refuse_incomplete(path, model, info)
    assert isinstance(model, PreTrainedModel)
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected weights: `refuse_incomplete` names them."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@torch.inference_mode()
def _note_attention(model: PreTrainedModel) -> None:
    """Note what the layers pass to attention, as one token shows it: sizes, and windows that only the config has.

    Raises ModelRefused if no KV layout holds the keys and values of all layers.
    """
    config, shown = model.config.get_text_config(), _ShownCalls()
    with as_model_refused(f"{type(model).__name__} can't be packed"):
        run_layers(model, [chain(0, 0, [0], keep_last=True)], shown)
    if not shown.layers:
        raise ModelRefused(
            f"{type(model).__name__} computes attention by itself and not by transformers' attention interface, which "
            "packed decoding needs; choose another model"
        )
    heads, kv_heads, head_dim = (max(shape[i] for shape, _ in shown.layers.values()) for i in range(3))
    if any(shape[0] != heads or kv_heads % shape[1] or heads % kv_heads for shape, _ in shown.layers.values()):
        raise ModelRefused(
            f"{type(model).__name__} has heads whose number differs from layer to layer; packed decoding needs numbers "
            "that divide each other, choose another model"
        )
    latents = {latent.latent_dim for module in model.modules() if (latent := getattr(module, LATENT, None)) is not None}
    setattr(model, ATTENTION_SHAPE, AttentionShape(heads, kv_heads, head_dim, max(latents, default=0)))
    windowed = sliding_layers(config, max_positions(config) or CHECK_ENTRIES)
    for module in model.modules():
        shape, window = shown.layers.get(getattr(module, "layer_idx", None), ((0, 0, 0), 0))
        if shape[0] and shape != (heads, kv_heads, head_dim):
            setattr(module, KV_SHAPE, (kv_heads, head_dim))
        if window is None and module.layer_idx in windowed:
            setattr(module, WINDOW_OF_CONFIG, True)


class _ShownCalls:
    """An attention plan for one row, which sees itself only."""

    def __init__(self) -> None:
        # By layer: heads, KV heads and the size of each, and the window.
        self.layers: dict[Any, tuple[tuple[int, int, int], int | None]] = {}
        self.tapped: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Note the call of a layer, and return the row's value for each of its heads."""
        self.layers[layer] = ((len(query), len(key), query.shape[-1]), options.window)
        return value.transpose(0, 1).repeat_interleave(len(query) // len(value), 1)


def _equivalence_check(model: PreTrainedModel) -> EquivalenceCheck:
    """Return the check for a freshly loaded model; raises ModelRefused if its packed rows are not exact."""
    config = model.config.get_text_config()
    backends: list[Backend] = []

    def packed(segments: Sequence[Segment], watched: Callable[[AttentionPlan], AttentionPlan]) -> Tensor:
        if not backends:
            dtype = None if is_offloaded(model) else torch.float32
            backends.append(make_backend(model, 2, CHECK_ENTRIES, cpu_kernels=False, paged=False, dtype=dtype))
        return run_layers(model, segments, watched(backends[0].plan(segments)))

    heads = (kv_heads_of(model), head_dim_of(model))
    check = build_check(model, config, max_positions(config) or CHECK_ENTRIES, heads, packed, ATTENTION_NAME)
    # Kernels for int8 and for FP8 activations round the rows, too.
    return check if quantization_method(model) in (None, QuantizationMethod.FP8) else check.coarser()


def embeddings(model: PreTrainedModel) -> Tensor:
    """Return a model's token embeddings [vocab, width]."""
    return _whole(model, "embeddings", model.get_input_embeddings().weight)


def output_weights(model: PreTrainedModel) -> Tensor:
    """Return the weights [vocab, width] of a model's logits; call it before `fuse_layers` packs them."""
    return _whole(model, "output", model.get_output_embeddings().weight)  # type: ignore[no-untyped-call]


def gather_embeddings(model: PreTrainedModel) -> None:
    """Gather the embeddings and output weights of a tensor parallel model, for a draft head that needs them whole.

    Every rank must call it. It does nothing for a model whose weights every rank has whole.
    """
    if is_dealt_by_transformers(model):
        parts = {"embeddings": model.get_input_embeddings(), "output": model.get_output_embeddings()}  # type: ignore[no-untyped-call]
        whole = {name: part.weight.full_tensor().detach() for name, part in parts.items()}
        setattr(model, _GATHERED, whole)


def _whole(model: PreTrainedModel, name: str, weight: Any) -> Tensor:
    gathered: dict[str, Tensor] = getattr(model, _GATHERED, {})
    assert name in gathered or not is_dealt_by_transformers(model), (
        "gather_embeddings() must run first on a tensor parallel model"
    )
    found = gathered.get(name, weight)
    assert isinstance(found, Tensor)
    if found.is_meta:
        raise ModelRefused("a head reads weights that are kept on disk here; set BASIC_DRAFT to a model, or to suffix")
    return found.detach()
