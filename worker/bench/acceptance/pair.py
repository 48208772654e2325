"""A target and its draft with random weights: everything that costs time is real, and texts mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from worker.bench.gpu_steps import random_model
from worker.bench.interleaved import SlotRange
from worker.drafters.head import HeadDrafter, PackedHead
from worker.drafters.head_network import HeadNetwork, HeadShape
from worker.drafters.model import ModelDrafter
from worker.engine.engine import Engine
from worker.engine.errors import ModelRefused
from worker.engine.model.architecture import kv_bytes_per_token
from worker.engine.model.backend import fuse_layers, uses_paged_kv
from worker.engine.model.loading import embeddings, output_weights
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import EngineOptions, Mode
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sampling.sampling import prepare as prepare_draws
from worker.engine.segments import chain
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.speculation.cost_model import CostModel
from worker.engine.speculation.draft_costs import DraftTimes
from worker.engine.speculation.drafting import Drafter
from worker.engine.speculation.state import SpeculationState
from worker.loading.calibration import calibrate, measure_drafts
from worker.loading.drafts import shipped_head
from worker.loading.memory import CPU_SHARE, GPU_SHARE, free_bytes
from worker.planning.shapes import load_config

HEAD = "head"  # name of a draft: one like the head that ships with the target, or one layer of the target's width
_HEAD_VOCABULARY = 32_000  # tokens that a head can propose, as published EAGLE-3 heads have them
_PROMPT_TOKENS = 64
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class RandomPair:
    """A target with twice the slots of the largest batch, for two engines at a time, and its draft."""

    target: PackedModel
    make_drafter: Callable[[], Drafter]
    vocabulary: int  # ids that both have
    options: EngineOptions
    costs: CostModel
    draft_times: DraftTimes
    device: str  # name for people
    dtype: str
    max_batch: int  # sequences whose keys and values fit the memory
    memory_note: str  # why no more

    def sequences(self, count: int, tokens: int) -> list[EngineSequence]:
        """Return sequences 0, 1, … with random prompts of their own, for greedy decoding."""
        return [self._sequence(index, tokens) for index in range(count)]

    def _sequence(self, index: int, tokens: int) -> EngineSequence:
        prompt = np.random.default_rng(index).integers(0, self.vocabulary, _PROMPT_TOKENS).tolist()
        return EngineSequence(index, prompt, _PROMPT_TOKENS, tokens, Sampling(key=noise_key(0, 0)), frozenset())

    def state(self) -> SpeculationState:
        """Return the state before the first step of a drafter."""
        return SpeculationState.of(self.draft_times, None)

    def engine(
        self,
        mode: Mode,
        batch: int,
        drafter: Drafter | None,
        state: SpeculationState | None,
        clock: Callable[[], float],
        *,
        second: bool = False,
    ) -> Engine:
        """Return an engine over the first slots of the target, or those of the `second` engine."""
        options = replace(self.options, mode=mode, max_sequences=batch)
        target = SlotRange(self.target, self.max_batch if second else 0, batch)
        return Engine(target, drafter, options, self.costs, state, clock=clock)


def random_pair(
    model: str,
    draft: str,
    batches: Sequence[int],
    tokens: int,
    clock: Callable[[], float],
    *,
    layers: int | None = None,
) -> RandomPair:
    """Return random models of these shapes, on the GPU if there is one, for the largest of the batches that fits.

    `draft` is `HEAD`, a directory with the config.json of a head, or a model as for `basic plan`. `layers` replaces the
    target's number of layers. Raises ModelRefused for shapes that can't be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = random_model(load_config(model), layers, device)
    config = network.config.get_text_config()
    shape = _head_shape(model, draft, config)
    smaller = None if shape else random_model(load_config(draft), None, device)
    options = EngineOptions(max_context=_PROMPT_TOKENS + tokens, prefill_rows=2048)
    fits, note = _fitting(network, shape, smaller, options)
    options = replace(options, max_sequences=max((size for size in batches if size <= fits), default=1))
    vocabulary = config.vocab_size
    if smaller is not None:
        vocabulary = min(vocabulary, smaller.config.get_text_config().vocab_size)
    # Before the layers are fused, which packs the output weights.
    shared = (embeddings(network), output_weights(network)[: shape.vocabulary].clone()) if shape else None
    target = _packed_target(network, options, vocabulary, shape.taps if shape else ())
    if shape is not None and shared is not None:
        make_drafter = _head_drafter(shape, shared, target, options)
    else:
        assert smaller is not None
        make_drafter = _model_drafter(smaller, draft, vocabulary, options)
    with TemporaryDirectory() as folder:
        costs = calibrate(target, options.slot_tokens, (), Path(folder), clock)
    times, _ = measure_drafts(make_drafter(), options.max_sequences, options.draft_slot_tokens, clock)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    dtype = str(network.dtype).removeprefix("torch.")
    return RandomPair(target, make_drafter, vocabulary, options, costs, times, name, dtype, options.max_sequences, note)


def _packed_target(
    network: PreTrainedModel, options: EngineOptions, vocabulary: int, taps: tuple[int, ...]
) -> PackedModel:
    fuse_layers(network)
    slots, capacity = 2 * options.max_sequences, options.slot_tokens
    target = PackedModel(network, slots=slots, capacity=capacity, defined_ids=vocabulary, tapped=taps)
    target.prepare()
    prepare_draws(target.forward([chain(0, 0, [0], keep_last=True)]))
    target.truncate(0, 0)
    return target


def _head_drafter(
    shape: HeadShape, shared: tuple[Tensor, Tensor], target: PackedModel, options: EngineOptions
) -> Callable[[], Drafter]:
    """`shared` are the target's embeddings, and its output weights of the tokens that the head can propose."""
    tokens = torch.arange(shape.vocabulary, device=shared[0].device)
    slots, capacity = options.max_sequences, options.draft_slot_tokens
    head = PackedHead(HeadNetwork(shape), *shared, tokens, slots=slots, capacity=capacity)
    head.prepare()
    hidden = target.hidden
    assert hidden is not None, "its layers are tapped"
    return lambda: HeadDrafter(head, hidden, HEAD)


def _model_drafter(
    network: PreTrainedModel, name: str, vocabulary: int, options: EngineOptions
) -> Callable[[], Drafter]:
    fuse_layers(network)
    kv_tokens = options.draft_kv_tokens if uses_paged_kv(network) else None
    slots, capacity = options.max_sequences, options.draft_slot_tokens
    packed = PackedModel(network, slots=slots, capacity=capacity, kv_tokens=kv_tokens)
    packed.prepare()
    return lambda: ModelDrafter(packed, name, vocabulary)


def _head_shape(model: str, draft: str, target: PretrainedConfig) -> HeadShape | None:
    """Return the shape of a head; None: the draft is a model."""
    folder = Path(draft)
    if draft == HEAD:
        shipped = shipped_head(model)
        if shipped is None:
            return HeadShape.of(target, 1, _HEAD_VOCABULARY)
        folder = shipped
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = HeadShape(**stored["shape"] | {"taps": tuple(stored["shape"]["taps"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if shape.width != target.hidden_size or max(shape.taps) >= target.num_hidden_layers:
        if draft == HEAD:  # the target's layers were replaced
            return HeadShape.of(target, shape.layers, shape.vocabulary)
        raise ModelRefused(
            f"{draft} is a head of width {shape.width} on layer {max(shape.taps)}; {model} has width "
            f"{target.hidden_size} and {target.num_hidden_layers} layers"
        )
    return shape


def _fitting(
    network: PreTrainedModel, shape: HeadShape | None, smaller: PreTrainedModel | None, options: EngineOptions
) -> tuple[int, str]:
    """Return the largest batch whose keys and values fit twice for the target and once for the draft, and a note."""
    each = 2 * options.slot_tokens * kv_bytes_per_token(network)
    if smaller is not None:
        each += options.draft_slot_tokens * kv_bytes_per_token(smaller)
    if shape is not None:
        itemsize = network.dtype.itemsize
        each += options.draft_slot_tokens * 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
        each += 2 * options.slot_tokens * len(shape.taps) * shape.width * itemsize
    free = free_bytes(network.device) * (GPU_SHARE if network.device.type == "cuda" else CPU_SHARE)
    return int(free // each), f"a sequence takes {each / _GIB:.3f} GiB, {free / _GIB:.1f} GiB are free"
