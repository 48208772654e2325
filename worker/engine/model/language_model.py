"""A language model as the engine sees it: packed rows in, logits out. Any transformers causal model, unmodified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from worker.engine.cpu.attention import CpuAttentionPlan
from worker.engine.cpu.fused_layers import fuse, tap
from worker.engine.cpu.fused_model import fused_model
from worker.engine.cpu.kernels import Kernels, kernels
from worker.engine.cpu.kv import CpuKv
from worker.engine.cpu.packed_linear import pack
from worker.engine.errors import ModelRefused
from worker.engine.gpu.fused_layers import fuse_on_gpu
from worker.engine.kv.dense import DenseKv
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.model.attention import ATTENTION_NAME, DenseAttentionPlan
from worker.engine.model.checkpoint import as_model_refused, refuse_incomplete, refuse_unfit, refuse_unreadable
from worker.engine.model.equivalence_check import CHECK_ENTRIES, AttentionPlan, EquivalenceCheck, build_check
from worker.engine.model.offload import (
    MultiDeviceAttentionPlan,
    MultiDeviceKv,
    OffloadOptions,
    input_device,
    is_offloaded,
    layer_devices,
)
from worker.engine.options import MAX_STEP_NODES
from worker.engine.paged.attention import GPU_BLOCK, PagedAttentionPlan, gpu_kernels_for, paged_plan
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import PagedRows
from worker.engine.paged.shape_buckets import BucketedForward, Outputs
from worker.engine.segments import KvMove, Segment, chain, kept_rows

# Beyond the original positions, frequencies of these depend on the longest text of the forward, so that one sequence
# would change another's numbers.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_ORIGINAL = "original_max_position_embeddings"
_SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")
_WHOLE = "basic_whole_weights"  # attribute of a split model: those of its weights that were gathered
_PROOF = "basic_proof"  # attribute of a loaded model: what it is held to when it is packed
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
_CPU_BLOCK = 16  # entries of a block of paged KV on a CPU: small texts fill several

Plan = DenseAttentionPlan | CpuAttentionPlan | PagedAttentionPlan | MultiDeviceAttentionPlan


class LanguageModel(Protocol):
    """What the engine needs of a model."""

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows, remember their keys and values, return logits [kept rows, vocab] in the segments' order."""

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring the rows of accepted paths down behind the committed prefix."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` tokens of one slot to another."""

    def truncate(self, slot: int, length: int) -> None:
        """Nobody will ask for more than the first `length` tokens of a slot."""

    def clear(self) -> None:
        """Nobody will ask for anything that is held now."""


class PackedModel:
    """A transformers causal model with a KV slot per sequence."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        capacity: int,
        defined_ids: int | None = None,
        cpu_kernels: bool = True,
        tapped: Sequence[int] = (),
        paged: bool | None = None,
        kv_tokens: int | None = None,
        verifies: bool = True,
    ) -> None:
        """Wrap a model loaded with `ATTENTION_NAME`.

        `capacity` is the KV entries per slot, tree rows included. Logits are cut to the first `defined_ids` tokens, so
        that padding of the vocabulary is never emitted. `cpu_kernels` allows compiled kernels, where there are any. The
        outputs of the layers `tapped` are kept for every entry, for a draft that reads them. `paged` KV with recorded
        forwards is the way of GPUs, and of the CPU where it is asked for; all its slots together then hold `kv_tokens`
        entries, by default every slot in full. With `verifies`, raises ModelRefused if
        the model does not decode exactly; a follower rank does not verify.
        """
        config = model.config.get_text_config()
        refuse_unsupported(config)
        self._model = model
        self._defined_ids = defined_ids
        self._slots = slots
        self._store = kv_store(model, slots, capacity, cpu_kernels, paged, kv_tokens)
        self.hidden: HiddenStates | None = None
        if tapped:
            tap(model, tapped)
            self.hidden = HiddenStates(
                slots, self.kv.capacity, len(tapped) * config.hidden_size, model.dtype, input_device(model)
            )
        # In one call where nothing of the model is left to transformers.
        compiled = self._store.compiled
        self._network = (
            fused_model(model, self.kv.capacity, compiled, self.hidden, max_positions(config)) if compiled else None
        )
        self._buckets: BucketedForward | None = None
        if isinstance(self.kv, PagedKv):
            self._buckets = BucketedForward(self._call_paged, self.kv)
        with as_model_refused(f"{type(model).__name__} can't be packed", ranks=ranks_of(model)):
            self._prove(getattr(model, _PROOF, None), kv_tokens, verifies)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the text model."""
        return self._model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Numbers of the weights."""
        return self._model.dtype

    @property
    def version(self) -> str:
        """What runs the model: the compiled kernels, by their hash, or torch."""
        compiled = self._store.compiled
        return "torch" if compiled is None else compiled.version

    @property
    def kv(self) -> DenseKv | CpuKv | PagedKv | MultiDeviceKv:
        """The model's KV slots."""
        return self._store.kv

    def _prove(self, proof: EquivalenceCheck | None, kv_tokens: int | None, verifies: bool) -> None:
        """Hold the model, as it will serve, to what it gave when it was loaded; raises ModelRefused.

        Where a slot holds less than the texts of the proof, and for models that `load` did not load, one token has to
        do: unknown attention arguments are refused here, not in a job.
        """
        if proof is None or self.kv.capacity < CHECK_ENTRIES:
            self.forward([chain(0, 0, [0], keep_last=True)])
        else:
            both = kv_tokens is None or kv_tokens >= 2 * max(GPU_BLOCK, CHECK_ENTRIES)
            proof.check(self.forward, slots=self._slots if both else 1, defined=self._defined_ids, verifies=verifies)
        for slot in range(min(self._slots, 2)):
            self.truncate(slot, 0)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the forwards that steps will replay, or make the room that they need, whichever way the model runs."""
        if self._buckets is not None:
            self._buckets.prepare()
        if self._network is not None:
            self._network.prepare(self._slots + MAX_STEP_NODES)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows of `segments`, which are in slot order; return logits [kept rows, vocab]."""
        logits, tapped = self._outputs(segments)
        if self.hidden is not None and tapped is not None:
            self.hidden.write(segments, tapped.flatten(1))
        return logits if self._defined_ids is None else logits[:, : self._defined_ids]

    def _outputs(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
        """Return logits [kept rows, vocab], and the outputs of tapped layers [rows, taps, width].

        Of the latter nothing if there are none, or if they stand in `hidden` already.
        """
        shape = self._buckets.shape_for(segments) if self._buckets is not None else None
        if shape is not None:
            assert self._buckets is not None
            return self._buckets.forward(segments, shape)
        plan = self._store.plan(segments)
        logits = self._network.forward(segments, plan)[0] if self._network else self._run(segments, plan)  # type: ignore[arg-type]
        return logits, plan.tapped

    def _run(self, segments: Sequence[Segment], plan: Plan) -> Tensor:
        return _run(self._model, segments, plan)

    def _call_paged(self, rows: PagedRows, plan: PagedAttentionPlan) -> Outputs:
        return _call(self._model, rows.ids, rows.positions, rows.kept, plan), plan.tapped

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Bring accepted rows down behind the committed prefix."""
        with torch.inference_mode():
            self.kv.compact(moves)
            if self.hidden is not None:
                self.hidden.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` tokens of one slot to another."""
        if source == target:
            self.truncate(target, length)
            return
        with torch.inference_mode():
            self.kv.copy_prefix(source, target, length)
            if self.hidden is not None:
                self.hidden.copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Give the memory of a slot back but for its first `length` entries, where it is taken bit by bit."""
        if isinstance(self.kv, PagedKv):
            self.kv.truncate(slot, length)

    def clear(self) -> None:
        """Give the memory of every slot back."""
        if isinstance(self.kv, PagedKv):
            for slot in range(self.kv.slots):
                self.kv.truncate(slot)


def _run(model: PreTrainedModel, segments: Sequence[Segment], plan: Plan | AttentionPlan) -> Tensor:
    """Let transformers' own model do it, layer by layer."""
    device = input_device(model)
    ids = torch.from_numpy(np.concatenate([s.ids for s in segments])).to(device)
    positions = torch.from_numpy(np.concatenate([s.positions for s in segments])).to(device)
    return _call(model, ids, positions, kept_rows(segments).to(device), plan)


def _call(model: PreTrainedModel, ids: Tensor, positions: Tensor, kept: Tensor, plan: Plan | AttentionPlan) -> Tensor:
    logits = model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=kept,
        plan=plan,
    ).logits[0]
    assert isinstance(logits, Tensor)
    return logits


@dataclass(frozen=True, slots=True)
class KvStore:
    """KV slots, and how a step's rows meet them."""

    kv: DenseKv | CpuKv | PagedKv | MultiDeviceKv
    compiled: Kernels | None
    plan: Callable[[Sequence[Segment]], Plan]


def kv_store(
    model: PreTrainedModel,
    slots: int,
    capacity: int,
    cpu_kernels: bool = True,
    paged: bool | None = None,
    kv_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> KvStore:
    """Return KV slots for a model, or for the layers of one, in the layout of what runs them.

    They hold numbers of `dtype`, by default the model's.
    """
    config, dtype = model.config.get_text_config(), dtype or model.dtype
    heads, kv_heads = config.num_attention_heads // ranks_of(model), _kv_heads(model)
    layers, head_dim = config.num_hidden_layers, _head_dim(model)
    if is_offloaded(model):
        offload = MultiDeviceKv(layer_devices(model), slots, kv_heads, capacity, head_dim, dtype)
        return KvStore(offload, None, lambda segments: MultiDeviceAttentionPlan(segments, offload, heads // kv_heads))
    if uses_paged_kv(model) if paged is None else paged:
        size = GPU_BLOCK if model.device.type == "cuda" else _CPU_BLOCK
        pages = PagedKv(
            layers, slots, kv_heads, capacity, head_dim, dtype, model.device, block_size=size, tokens=kv_tokens
        )
        return KvStore(pages, None, lambda segments: paged_plan(segments, pages))
    compiled = _kernels_for(model) if cpu_kernels else None
    if compiled is None:
        slow = DenseKv(layers, slots, kv_heads, capacity, head_dim, dtype, model.device)
        return KvStore(slow, None, lambda segments: DenseAttentionPlan(segments, slow, heads // kv_heads))
    fast = CpuKv(layers, slots, kv_heads, capacity, head_dim, dtype, compiled)
    return KvStore(fast, compiled, lambda segments: CpuAttentionPlan(segments, fast, heads, compiled))


def uses_paged_kv(model: PreTrainedModel) -> bool:
    """True if a model's KV is paged unless something else is asked for: on a GPU that it has to itself.

    Ranks that follow another one record nothing and hear of no slot that is given back; they hold every slot in full.
    """
    return model.device.type == "cuda" and ranks_of(model) == 1 and not is_offloaded(model)


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Return what the keys and values of one token take."""
    config = model.config.get_text_config()
    return int(2 * config.num_hidden_layers * _kv_heads(model) * _head_dim(model) * model.dtype.itemsize)


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise ModelRefused, with the reason, for a configuration that the packed forward can't decode exactly."""
    try:
        for name in ("head_dim", "num_key_value_heads"):
            getattr(config, name, None)
    except Exception as error:  # transformers has a class of its own for it, which no name of its API is
        raise ModelRefused(
            f"{config.model_type} has heads whose number or size differs from layer to layer; packed decoding needs "
            "one for all, choose another model"
        ) from error
    unknown = set(getattr(config, "layer_types", None) or []) - _KNOWN_LAYERS
    if unknown:
        raise ModelRefused(
            f"{config.model_type} has layers of type {', '.join(sorted(unknown))}; only attention can be packed, "
            "choose another model"
        )
    missing = [name for name in _SIZES if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ModelRefused(
            f"{config.model_type} has no {missing[0]} in its configuration, and only models of attention layers can be "
            "packed; choose another model"
        )


def refuse_tp_size(config: PretrainedConfig, ranks: int) -> None:
    """Raise ModelRefused, with what can be done instead, for heads that can't be dealt out to so many ranks."""
    if ranks not in tp_sizes(config):
        heads, kv_heads = _heads(config)
        raise ModelRefused(
            f"{heads} heads over {kv_heads} KV heads can't be split over {ranks} ranks; use --tp "
            f"{' or '.join(map(str, tp_sizes(config)))}, with more replicas beside it, or see `basic plan`"
        )


def tp_sizes(config: PretrainedConfig) -> list[int]:
    """Return the numbers of ranks that a model's heads can be dealt out to."""
    heads, kv_heads = _heads(config)
    return [ranks for ranks in range(1, kv_heads + 1) if kv_heads % ranks == 0 and heads % ranks == 0]


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each kind of rotary embeddings: one for all layers, or one for each kind of layer."""
    if isinstance(parameters.get("rope_type"), str):
        yield parameters
    for nested in parameters.values():
        if isinstance(nested, dict):
            yield from _ropes(nested)


def native_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest exact-enough dtype: bfloat16 where the hardware computes in it, else float32."""
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load(
    path: str, *, dtype: torch.dtype, device: torch.device, ranks: int = 1, offload: OffloadOptions | None = None
) -> PreTrainedModel:
    """Load a causal model for packed decoding from a local directory or a hub id; safetensors only, no remote code.

    With `ranks` it is this process's share, by the tensor parallel plan that transformers has for the model; with
    `offload` accelerate lays it out over all devices. Raises ModelRefused with what to do when it is missing or not
    supported.
    """
    with as_model_refused(f"{path} could not be loaded", ranks=ranks):
        refuse_unreadable(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        refuse_unfit(path, config)
        refuse_unsupported(config.get_text_config())
        refuse_tp_size(config.get_text_config(), ranks)
        model = _loaded(path, dtype, ranks, offload)
        if not is_offloaded(model):
            model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to as its types don't say
        model.eval()  # type: ignore[no-untyped-call]
        setattr(model, _PROOF, _proven(model))
        return model


def _loaded(path: str, dtype: torch.dtype, ranks: int, offload: OffloadOptions | None) -> PreTrainedModel:
    """Let transformers load a model; raises ModelRefused unless all of its weights were there, and no others."""
    try:
        with _few_words():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                distributed_config=DistributedConfig(tp_size=ranks) if ranks > 1 else None,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **(offload.options() if offload else {}),
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
def _few_words() -> Iterator[None]:
    """Keep transformers' own report of a checkpoint to itself: what it finds is refused in a sentence."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _proven(model: PreTrainedModel) -> EquivalenceCheck:
    """Return what a model that was just loaded is held to; raises ModelRefused if its packed rows are not exact."""
    config = model.config.get_text_config()
    stores: list[KvStore] = []

    def packed(segments: Sequence[Segment], watched: Callable[[AttentionPlan], AttentionPlan]) -> Tensor:
        if not stores:
            dtype = None if is_offloaded(model) else torch.float32
            stores.append(kv_store(model, 2, CHECK_ENTRIES, cpu_kernels=False, paged=False, dtype=dtype))
        return _run(model, segments, watched(stores[0].plan(segments)))

    heads = (_kv_heads(model), _head_dim(model))
    return build_check(model, config, max_positions(config) or CHECK_ENTRIES, heads, packed, ATTENTION_NAME)


def max_positions(config: PretrainedConfig) -> int | None:
    """Return how many positions a text model computes exactly in any batch; None if its configuration sets no end.

    Rotary frequencies that depend on the longest text of a forward don't below the original number of positions.
    """
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions")]
    ropes = list(_ropes(getattr(config, "rope_parameters", None) or {}))
    if any(rope.get("rope_type") in _BATCH_DEPENDENT_ROPE for rope in ropes):
        known += [rope.get(_ORIGINAL) for rope in ropes] + [getattr(config, _ORIGINAL, None)]
    return min((int(n) for n in known if isinstance(n, int) and n > 0), default=None)


def batch_dependent_rope(config: PretrainedConfig) -> str | None:
    """Return the kind of rotary embeddings whose frequencies change beyond `max_positions`, if there are such."""
    kinds = (str(rope.get("rope_type")) for rope in _ropes(getattr(config, "rope_parameters", None) or {}))
    return next((kind for kind in kinds if kind in _BATCH_DEPENDENT_ROPE), None)


def embeddings(model: PreTrainedModel) -> Tensor:
    """Return a model's token embeddings [vocab, width]."""
    return _whole(model, "embeddings", model.get_input_embeddings().weight)


def output_weights(model: PreTrainedModel) -> Tensor:
    """Return the weights [vocab, width] of a model's logits, before they are packed."""
    return _whole(model, "output", model.get_output_embeddings().weight)  # type: ignore[no-untyped-call]


def gather_embeddings(model: PreTrainedModel) -> None:
    """Collect the embeddings and output weights of a model that is split, for a draft that needs them whole.

    Every rank must call it; it does nothing for a model that is not split.
    """
    if ranks_of(model) > 1:
        parts = {"embeddings": model.get_input_embeddings(), "output": model.get_output_embeddings()}  # type: ignore[no-untyped-call]
        whole = {name: part.weight.full_tensor().detach() for name, part in parts.items()}
        setattr(model, _WHOLE, whole)


def _whole(model: PreTrainedModel, name: str, weight: Any) -> Tensor:
    gathered: dict[str, Tensor] = getattr(model, _WHOLE, {})
    assert name in gathered or ranks_of(model) == 1, "the weights of a model that is split are gathered first"
    found = gathered.get(name, weight)
    assert isinstance(found, Tensor)
    if found.is_meta:
        raise ModelRefused("a head reads weights that are kept on disk here; set BASIC_DRAFT to a model, or to suffix")
    return found.detach()


def fuse_layers(model: PreTrainedModel) -> None:
    """Swap in what computes the same faster on this processor: fused layers, packed products."""
    on_gpu = gpu_kernels_for(model.device) if uses_paged_kv(model) else None
    if on_gpu is not None:
        fuse_on_gpu(model, on_gpu)
    compiled = _kernels_for(model)
    if compiled is not None:
        fuse(model, compiled)
        pack(model, compiled)


def _kernels_for(model: PreTrainedModel) -> Kernels | None:
    """Return the compiled kernels if they take this model."""
    ours = model.device.type == "cpu" and ranks_of(model) == 1 and not is_offloaded(model)
    compiled = kernels(model.dtype) if ours else None
    return compiled if compiled is not None and _head_dim(model) % compiled.panel == 0 else None


def _kv_heads(model: PreTrainedModel) -> int:
    return _heads(model.config.get_text_config())[1] // ranks_of(model)


def ranks_of(model: PreTrainedModel) -> int:
    """Return over how many ranks a loaded model is split; its heads are dealt out to them."""
    return model.tp_size or 1


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
