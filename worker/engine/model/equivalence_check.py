"""Check that a loaded model gives the same logits for packed rows as in transformers' own forward.

Run three short sequences, two with a common prefix, through transformers' model. Then run the same tokens as packed
rows: chains, and a draft tree behind a prefix. First in float32, where both must agree up to the order of sums. Then
with the dtype, kernels and KV layout that serve: their distance from float32 may be that of transformers' own forward
in this dtype, times a small factor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel

from worker.engine.attention_options import AttentionOptions
from worker.engine.errors import ModelRefused
from worker.engine.model.architecture import layers_of
from worker.engine.model.attention import AttentionPlan
from worker.engine.model.checkpoint import as_model_refused
from worker.engine.model.offload import input_device, is_offloaded
from worker.engine.segments import IntArray, Segment, chain

ATTRIBUTE = "basic_equivalence_check"  # attribute of a loaded model: the check that it must pass when it is packed
CHECK_ENTRIES = 20  # KV entries that the check needs in a slot: a sequence, and tree nodes that are not on its path
_LENGTH, _SHORTEST = 16, 4  # tokens of a sequence
_DRAFTED = 2  # last tokens of a sequence: draft nodes below the root
_WINDOW = 5  # positions of a sliding window during the check: fewer than a sequence has
# Allowed distances, relative to the spread of the logits. In float32 another order of sums gives 1e-5, another formula
# 1e-2.
_EXACT = 1e-3
# For the median row in bfloat16, where sums differ by about 0.03, and by more where a row takes another expert.
_COARSE = 0.25
_SLACK = 4.0  # allowed multiple of the distance of transformers' own bfloat16 forward from float32
_MASKED = 1e30  # logits beyond it are masks
_NARROW = (torch.bfloat16, torch.float16)  # dtypes that are widened to float32

Forward = Callable[[Sequence[Segment]], Tensor]  # packed rows -> logits [kept, vocab]


@dataclass(frozen=True, slots=True)
class EquivalenceCheck:
    """The logits that a model must reproduce when it is packed."""

    kind: str  # class of the model
    sequences: IntArray  # [3, n] token ids
    exact: Tensor  # [3 * n, vocab] logits of transformers' own forward, in float32
    allowed: float  # distance from them, relative to their spread
    wide: bool  # the model computes in float32: check every row, not the median of each kind of rows

    def coarser(self) -> EquivalenceCheck:
        """Return the check for kernels that round more than the dtype does."""
        return replace(self, allowed=max(self.allowed, _COARSE), wide=False)

    def check(self, forward: Forward, *, slots: int, defined: int | None = None, verifies: bool = True) -> None:
        """Run packed rows in `slots` KV slots; raise ModelRefused, with the distance, if the logits differ.

        Without `verifies`, for followers of a tensor parallel replica, only run the rows.
        """
        if not verifies:
            for segments, _ in _steps(self.sequences, min(slots, 2)):
                forward(segments)
            return
        for rows, found in _distances(self, forward, min(slots, 2), defined).items():
            worst = float(found.max() if self.wide else found.median())
            if not worst <= self.allowed:  # also if it is NaN
                raise ModelRefused(
                    f"{self.kind} is not exact when it is packed: the logits of {rows} are {worst:.2g} of their spread "
                    f"away from those of transformers' own forward, and {self.allowed:.2g} is what rounding explains; "
                    "choose another model"
                )


@torch.inference_mode()
def build_check(
    model: PreTrainedModel,
    config: PretrainedConfig,
    positions: int,
    heads: tuple[int, int],
    packed: Callable[[Sequence[Segment], Callable[[AttentionPlan], AttentionPlan]], Tensor],
    attention_name: str,
) -> EquivalenceCheck:
    """Return the check for a loaded model; raises ModelRefused if its packed rows are not exact in float32.

    `config` is that of its text model, `positions` how many it supports, `heads` the number of its KV heads and their
    size. `packed` runs rows with fresh KV and wraps their attention plan with its last argument; `attention_name` is
    the attention function that it needs.
    """
    kind, ranks = type(model).__name__, model.tp_size or 1
    sequences = _sequences(int(config.vocab_size), max(_SHORTEST, min(_LENGTH, positions)))
    watched = _Watch(kind, layers_of(config), heads, sliding_layers(config, positions))

    def forward(segments: Sequence[Segment]) -> Tensor:
        with as_model_refused(f"{kind} can't be packed", ranks=ranks):
            logits = packed(segments, watched.start)
        watched.refuse_unless_once_per_layer()
        return logits

    narrow = model.dtype in _NARROW
    widened = narrow and not is_offloaded(model)
    in_float32 = _InFloat32 if widened else nullcontext
    bound = _EXACT if widened or not narrow else _COARSE
    with in_float32(), _short_windows(model, config) as shortened:
        exact = _reference(model, sequences, attention_name)
        EquivalenceCheck(kind, sequences, exact, bound, wide=bound == _EXACT).check(forward, slots=2)
    if shortened:
        with in_float32():
            exact = _reference(model, sequences, attention_name)
    if not widened:
        return EquivalenceCheck(kind, sequences, exact, bound, wide=bound == _EXACT)
    rounding = float(_distance(_reference(model, sequences, attention_name), exact).median())
    return EquivalenceCheck(kind, sequences, exact, max(_COARSE, _SLACK * rounding), wide=False)


def _sequences(vocabulary: int, length: int) -> IntArray:
    """Return token ids [3, length]; the second and third sequence differ in the last two only."""
    first, count = vocabulary // 8, max(vocabulary // 4, 4)
    plain, shared = (first + (np.arange(length) * step + step) % count for step in (7, 5))
    other = shared.copy()
    other[-_DRAFTED:] = first + (shared[-_DRAFTED:] - first + 1 + np.arange(_DRAFTED)) % count
    return np.stack([plain, shared, other]).astype(np.int64) % vocabulary


def _reference(model: PreTrainedModel, sequences: IntArray, attention_name: str) -> Tensor:
    """Return the logits [3 * n, vocab] of transformers' own forward, on the CPU in float32."""
    model.set_attn_implementation("eager")
    try:
        with as_model_refused(f"transformers' own forward of {type(model).__name__} fails", ranks=model.tp_size or 1):
            logits = model(input_ids=torch.from_numpy(sequences).to(input_device(model)), use_cache=False).logits
    finally:
        model.set_attn_implementation(attention_name)
    found: Tensor = logits.flatten(0, 1).float().cpu()  # in main memory: it lives as long as the model
    if found.isnan().any():
        raise ModelRefused(f"transformers' own forward of {type(model).__name__} gives NaN; its weights are damaged")
    return found


def _distances(check: EquivalenceCheck, forward: Forward, slots: int, defined: int | None) -> dict[str, Tensor]:
    """Return the distance of each packed row from its reference, by the kind of rows."""
    found: dict[str, list[Tensor]] = {}
    for segments, expected in _steps(check.sequences, slots):
        logits = forward(segments).float().cpu()
        rows = iter(torch.split(logits, [len(indices) for indices in expected]))
        for segment, indices, row in zip(segments, expected, rows, strict=True):
            kind = "draft trees" if segment.visible is not None else "plain rows"
            exact = check.exact[torch.from_numpy(indices)]
            found.setdefault(kind, []).append(_distance(row, exact if defined is None else exact[:, :defined]))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def _distance(rows: Tensor, exact: Tensor) -> Tensor:
    """Return [n]: the distance of rows from the exact ones, relative to their spread; skip logits that both mask."""
    numbers = exact.abs() < _MASKED
    apart = torch.where((rows == exact) | ~(numbers | (rows.abs() < _MASKED)), 0.0, rows - exact)
    plain = torch.where(numbers, exact, 0.0)
    mean = plain.sum(1, keepdim=True) / numbers.sum(1, keepdim=True).clamp(min=1)
    spread = torch.where(numbers, exact - mean, 0.0).norm(dim=1)
    found: Tensor = apart.norm(dim=1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return found


def _steps(sequences: IntArray, slots: int) -> Iterator[tuple[list[Segment], list[IntArray]]]:
    """Yield the segments of each forward, with the indices into the reference rows [3 * n] of each segment's rows.

    With two slots, the plain sequence is next to the one with the tree; with one slot, skip it.
    """
    plain, shared, other = sequences
    length = len(plain)
    root = length - _DRAFTED - 1
    at = np.arange(length)
    tree = _tree(slots - 1, root, [shared[root], shared[root + 1], other[root + 1], shared[-1], other[-1]])
    below = np.array([root, root + 1, length + root + 1, root + 2, length + root + 2])
    prompts = [_whole(slots - 1, 0, shared[:root])]
    expected = [length + at[:root]]
    decoding, then = [tree], [length + below]
    if slots > 1:
        prompts, expected = [_whole(0, 0, plain[:-1]), *prompts], [at[:-1], *expected]
        decoding, then = [_whole(0, length - 1, plain[-1:]), *decoding], [at[-1:], *then]
    yield prompts, expected
    yield decoding, then


def _whole(slot: int, cached: int, ids: IntArray) -> Segment:
    """Return a chain with logits of every row."""
    return replace(chain(slot, cached, ids.tolist(), keep_last=True), keep=np.arange(len(ids)))


def _tree(slot: int, root: int, ids: Sequence[int]) -> Segment:
    """Return the rows of a root with two children that have one child each."""
    seen = np.eye(5, dtype=np.bool_)
    seen[:, 0] = seen[3, 1] = seen[4, 2] = True
    positions = root + np.array([0, 1, 1, 2, 2])
    return Segment(slot, root, root, np.asarray(ids, np.int64), positions, seen, np.arange(5))


def sliding_layers(config: PretrainedConfig, positions: int) -> frozenset[int]:
    """Return the layers whose sliding window is smaller than the model's positions, by the configuration."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers_of(config)
    grown = 0 < _window(config) < positions
    return frozenset(layer for layer, kind in enumerate(kinds) if grown and kind == "sliding_attention")


@dataclass(slots=True)
class _Watch:
    """Checks the attention calls of a forward."""

    kind: str
    layers: int
    heads: tuple[int, int]  # number of KV heads, size of each
    sliding: frozenset[int]  # layers that must pass their window to attention
    calls: Counter[int] = field(default_factory=Counter)

    def start(self, plan: AttentionPlan) -> AttentionPlan:
        """Start a forward: return its plan, watched."""
        self.calls.clear()
        return _Watched(plan, self)

    def note(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> None:
        """Count a call; raises ModelRefused if its shapes or window differ from the configuration."""
        self.calls[layer] += 1
        count, size = self.heads
        if {key.shape[2], value.shape[2], query.shape[2]} != {size} or {key.shape[0], value.shape[0]} != {count}:
            raise ModelRefused(
                f"{self.kind} has queries of size {query.shape[2]}, {key.shape[0]} keys of size {key.shape[2]} and "
                f"{value.shape[0]} values of size {value.shape[2]}; by its "
                f"configuration it has {count} KV heads of size {size}, which packed decoding needs; choose another "
                "model"
            )
        if layer in self.sliding and window is None:
            raise ModelRefused(
                f"{self.kind} has a sliding window in its configuration and does not pass it to attention, which "
                "packed decoding needs; choose another model"
            )

    def refuse_unless_once_per_layer(self) -> None:
        """Raise ModelRefused, with the counts, unless every layer called attention once in the last forward."""
        if dict(self.calls) != dict.fromkeys(range(self.layers), 1):
            raise ModelRefused(
                f"{self.kind} called attention {self.calls.total()} times in {len(self.calls)} of its {self.layers} "
                "layers, and packed decoding needs one call in each; choose another model"
            )


@dataclass(slots=True)
class _Watched:
    """An attention plan that reports its calls."""

    plan: AttentionPlan
    watch: _Watch
    tapped: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Report the call, and attend."""
        self.watch.note(layer, query, key, value, options.window)
        return self.plan.attend(layer, query, key, value, options)


class _InFloat32(TorchFunctionMode):
    """Compute in float32: widen each tensor where it is used, so that only one weight at a time is copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch on widened tensors; reading a property needs no copy."""
        if getattr(func, "__name__", "") == "__get__":
            found = func(*args)
            return _wide(found) if isinstance(found, torch.dtype) else found
        return _wide(func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {})))


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.float() if x.dtype in _NARROW else x
    return torch.float32 if isinstance(x, torch.dtype) and x in _NARROW else x


@contextmanager
def _short_windows(model: PreTrainedModel, config: PretrainedConfig) -> Iterator[bool]:
    """Shorten sliding windows to fewer positions than the sequences have; yield whether any was longer."""
    owners: list[Any] = [owner for owner in (config, *model.modules()) if _window(owner) > _WINDOW]
    before = [(owner, _window(owner)) for owner in owners]
    try:
        for owner in owners:
            owner.sliding_window = _WINDOW
        yield bool(owners)
    finally:
        for owner, window in before:
            owner.sliding_window = window


def _window(owner: Any) -> int:
    found = getattr(owner, "sliding_window", None)
    return found if isinstance(found, int) else 0
