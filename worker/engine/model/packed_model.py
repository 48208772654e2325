"""A language model as the engine sees it: packed rows in, logits out. Any transformers causal model, unmodified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from worker.engine.cpu.fused_layers import tap
from worker.engine.cpu.fused_model import fused_model
from worker.engine.kv.fp8 import has_fp8_kv
from worker.engine.kv.hidden_states import HiddenStates
from worker.engine.kv.store import KvStore
from worker.engine.model.architecture import long_text_tokens, max_positions, ranks_of, refuse_unsupported
from worker.engine.model.attention import AttentionPlan, attending
from worker.engine.model.backend import make_backend
from worker.engine.model.checkpoint import as_model_refused
from worker.engine.model.equivalence_check import ATTRIBUTE, CHECK_ENTRIES, EquivalenceCheck
from worker.engine.model.long_texts import LONG_OFFSET
from worker.engine.model.offload import input_device
from worker.engine.options import MAX_STEP_NODES
from worker.engine.paged.attention import GPU_BLOCK, PagedAttentionPlan
from worker.engine.paged.rows import PagedRows
from worker.engine.paged.shape_buckets import Outputs
from worker.engine.paged.step import PagedStep
from worker.engine.segments import IntArray, KvMove, Segment, Segments, chain


class LanguageModel(Protocol):
    """What the engine needs of a model."""

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows, store their keys and values, return logits [kept rows, vocab] in the segments' order."""

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move the KV entries of accepted paths down to the end of the committed prefix."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` KV entries of slot `source` to slot `target`."""

    def truncate(self, slot: int, length: int) -> None:
        """Free the memory of a slot beyond its first `length` entries."""

    def clear(self) -> None:
        """Free the memory of every slot."""


@runtime_checkable
class ChoosesFactors(Protocol):
    """A model whose texts choose the factors of longrope."""

    def mark_long(self, slot: int, long: bool) -> None:
        """Let the rows of a slot have the long factors of longrope from now on, or the short ones."""


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
        that padding of the vocabulary is never emitted. `cpu_kernels` allows the compiled kernels where they run.
        `tapped` layers store their outputs for every KV entry, for a draft head that reads them.

        `paged` selects paged KV with captured forwards: the default on GPUs, an option on CPUs. Its slots together hold
        `kv_tokens` entries, by default every slot in full. With `verifies`, raises ModelRefused if the model does not
        decode exactly; followers of a tensor parallel replica do not verify.
        """
        config = model.config.get_text_config()
        refuse_unsupported(config)
        self._model = model
        self._defined_ids = defined_ids
        self._slots = slots
        self._backend = make_backend(model, slots, capacity, cpu_kernels=cpu_kernels, paged=paged, kv_tokens=kv_tokens)
        self.hidden: HiddenStates | None = None
        if tapped:
            tap(model, tapped)
            self.hidden = HiddenStates(
                slots, self.kv.capacity, len(tapped) * config.hidden_size, model.dtype, input_device(model)
            )
        # One call for the whole forward, if every layer of the model is fused.
        compiled = self._backend.kernels
        by_text = long_text_tokens(config) is not None  # then rows have positions that no table of angles has
        self._offsets = np.zeros(slots + 1, np.int64) if by_text else None  # of the positions of each slot; padding
        self._device_offsets = (
            None if self._offsets is None else torch.from_numpy(self._offsets).to(input_device(model), copy=True)
        )
        self._network = (
            fused_model(model, self.kv.capacity, compiled, self.hidden, max_positions(config))
            if compiled and not by_text
            else None
        )
        self._buckets = self._backend.bucketed(self._call_paged)
        with as_model_refused(f"{type(model).__name__} can't be packed", ranks=ranks_of(model)):
            self._verify(getattr(model, ATTRIBUTE, None), kv_tokens, verifies)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the text model."""
        return self._model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self._model.dtype

    @property
    def version(self) -> str:
        """The hash of the compiled kernels that run the model, or "torch"."""
        compiled = self._backend.kernels
        return "torch" if compiled is None else compiled.version

    @property
    def capture_failures(self) -> dict[str, str]:
        """Why forwards run without a CUDA graph, and so slower: the reason, by their shape."""
        return {} if self._buckets is None else self._buckets.capture_failures

    @property
    def kv(self) -> KvStore:
        """The model's KV slots."""
        return self._backend.kv

    def _verify(self, check: EquivalenceCheck | None, kv_tokens: int | None, verifies: bool) -> None:
        """Compare the model, as it will serve, with its logits when it was loaded; raises ModelRefused if they differ.

        Run one token where a slot is too small for the check, and for models that `load` did not load, so that
        unsupported attention arguments are refused here and not in a job.
        """
        if check is None or self.kv.capacity < CHECK_ENTRIES:
            self.forward([chain(0, 0, [0], keep_last=True)])
        else:
            both = kv_tokens is None or kv_tokens >= 2 * max(GPU_BLOCK, CHECK_ENTRIES)
            check = check.coarser() if has_fp8_kv(self._model) else check
            check.check(self.forward, slots=self._slots if both else 1, defined=self._defined_ids, verifies=verifies)
        for slot in range(min(self._slots, 2)):
            self.truncate(slot, 0)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture the forwards that steps replay, and allocate their buffers, so that no request waits for either."""
        if self._buckets is not None:
            self._buckets.prepare()
        if self._network is not None:
            self._network.prepare(self._slots + MAX_STEP_NODES)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run the rows of `segments`, which are in slot order; return logits [kept rows, vocab]."""
        packed = Segments.of(segments)
        logits, tapped = self._outputs(packed)
        if self.hidden is not None and tapped is not None:
            self.hidden.write(packed, tapped.flatten(1))
        return logits if self._defined_ids is None else logits[:, : self._defined_ids]

    def _outputs(self, segments: Segments) -> tuple[Tensor, Tensor | None]:
        """Return logits [kept rows, vocab], and the outputs of tapped layers [rows, taps, width].

        The latter is None if no layer is tapped, or if the fused model has written to `hidden` itself.
        """
        if self._buckets is not None:
            return self._buckets.forward(segments, self._buckets.shape_for(segments))
        plan = self._backend.plan(segments)
        if self._network is None:
            return run_layers(self._model, segments, plan, self._offsets), plan.tapped
        return self._network.forward(segments, plan)[0], plan.tapped  # type: ignore[arg-type]  # the backend's own plan

    @torch.inference_mode()
    def follow(self, step: PagedStep) -> None:
        """Run a step that another rank laid out on paged KV, and discard its logits."""
        assert self._buckets is not None, "only paged KV follows steps"
        self._buckets.follow(step)

    def _call_paged(self, rows: PagedRows, plan: PagedAttentionPlan) -> Outputs:
        positions = rows.positions
        if self._device_offsets is not None:
            positions = positions + self._device_offsets[rows.slots[rows.sequence]]
        return _call(self._model, rows.ids, positions, rows.kept, plan), plan.tapped

    def mark_long(self, slot: int, long: bool) -> None:
        """Let the rows of a slot have the long factors of longrope from now on, or the short ones."""
        if self._offsets is None or self._device_offsets is None:
            assert not long, "the model was not loaded with factors by text"
            return
        self._offsets[slot] = LONG_OFFSET if long else 0
        self._device_offsets[slot] = LONG_OFFSET if long else 0

    def compact(self, moves: Sequence[KvMove]) -> None:
        """Move the KV entries of accepted paths down to the end of the committed prefix."""
        with torch.inference_mode():
            self.kv.compact(moves)
            if self.hidden is not None:
                self.hidden.compact(moves)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` KV entries of slot `source` to slot `target`."""
        with torch.inference_mode():
            self.kv.copy_prefix(source, target, length)
            if self.hidden is not None:
                self.hidden.copy_prefix(source, target, length)

    def truncate(self, slot: int, length: int) -> None:
        """Free the memory of a slot beyond its first `length` entries."""
        self.kv.truncate(slot, length)
        if self.hidden is not None:
            self.hidden.truncate(slot, length)

    def clear(self) -> None:
        """Free the memory of every slot."""
        if self._offsets is not None and self._device_offsets is not None:
            self._offsets[:] = 0
            self._device_offsets.zero_()
        for slot in range(self._slots):
            PackedModel.truncate(self, slot, 0)  # not the subclass's: other ranks clear at once


def run_layers(
    model: PreTrainedModel, segments: Sequence[Segment], plan: AttentionPlan, offsets: IntArray | None = None
) -> Tensor:
    """Run the rows through the layers of transformers' model; return logits [kept rows, vocab].

    `offsets` of slots are added to the positions that the model sees.
    """
    packed, device = Segments.of(segments), input_device(model)
    seen = packed.positions if offsets is None else packed.positions + offsets[packed.per_row(packed.slots)]
    ids, positions, kept = (torch.from_numpy(part).to(device) for part in (packed.ids, seen, packed.kept))
    return _call(model, ids, positions, kept, plan)


def _call(model: PreTrainedModel, ids: Tensor, positions: Tensor, kept: Tensor, plan: AttentionPlan) -> Tensor:
    with attending(plan):
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
