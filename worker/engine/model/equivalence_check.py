"""The proof that a loaded model gives when it is packed what it gives in transformers' own forward.

Three short texts, two of which begin alike, run through the model as transformers wrote it; then the same tokens run as
packed rows: chains, and a draft tree behind a prefix. First in float32 whatever the weights are, where both must agree
but for the order of sums; then in the numbers, kernels and KV that serve, which may be as far from float32 as
transformers' own forward is in these numbers, and a little further.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig, PreTrainedModel

from worker.engine.errors import ModelRefused
from worker.engine.model.checkpoint import as_model_refused
from worker.engine.model.offload import input_device, is_offloaded
from worker.engine.segments import IntArray, Segment, chain

CHECK_ENTRIES = 20  # KV entries of a slot: a text, and the nodes of a tree that are not on its path
_LENGTH, _SHORTEST = 16, 4  # tokens of a text
_BEHIND = 2  # tokens of a text that are draft nodes below the root
_WINDOW = 5  # positions of a sliding window under test: fewer than a text has
_EXACT = 1e-3  # of the spread of the logits; float32 sums in another order differ by 1e-5, another formula by 1e-2
_SLACK = 4.0  # how much further from float32 than transformers' own forward ours may be, where that is far itself
# The same in bfloat16, whose sums differ by some 0.03, and by more where a row takes another expert: of half the rows.
_COARSE = 0.25
_NOTHING = 1e30  # logits beyond it are masks, not numbers
_NARROW = (torch.bfloat16, torch.float16)

Forward = Callable[[Sequence[Segment]], Tensor]  # packed rows -> logits [kept, vocab]


class AttentionPlan(Protocol):
    """What the rows of a forward see."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Store keys and values, attend; inputs are [heads, n, head_dim]."""


@dataclass(frozen=True, slots=True)
class EquivalenceCheck:
    """What a model must give."""

    who: str  # class of the model
    texts: IntArray  # [3, n]
    exact: Tensor  # [3 * n, vocab] logits of transformers' own forward, in float32
    allowed: float  # distance from them, of their spread
    wide: bool  # the model computes in float32: every row is held to it, and else the median of each kind

    def check(self, forward: Forward, *, slots: int, defined: int | None = None, verifies: bool = True) -> None:
        """Run packed rows in `slots` KV slots; raise ModelRefused, with the distance, if they give something else.

        A rank that follows runs them too and verifies nothing.
        """
        distances = _distances(self, forward, min(slots, 2), defined)
        for kind, found in distances.items() if verifies else ():
            worst = float(found.max() if self.wide else found.median())
            if not worst <= self.allowed:  # also where it is no number
                raise ModelRefused(
                    f"{self.who} is not exact when it is packed: the logits of {kind} are {worst:.2g} of their spread "
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
    ours: str,
) -> EquivalenceCheck:
    """Return what a loaded model, as transformers wrote it, gives; raises ModelRefused if it is packed wrongly.

    `config` is of its text model, which knows `positions` and has `heads` (KV heads, and numbers of each). `packed`
    runs rows with fresh KV and lets its last argument wrap their attention; `ours` is the name of the attention
    function that it takes.
    """
    who, ranks = type(model).__name__, model.tp_size or 1
    texts = _texts(int(config.vocab_size), max(_SHORTEST, min(_LENGTH, positions)))
    watched = _Watch(who, int(config.num_hidden_layers), heads, _sliding(config, positions))

    def forward(segments: Sequence[Segment]) -> Tensor:
        with as_model_refused(f"{who} can't be packed", ranks=ranks):
            logits = packed(segments, watched.on)
        watched.refuse_other_than_once_a_layer()
        return logits

    narrow = model.dtype in _NARROW
    widened = narrow and not is_offloaded(model)
    in_float32 = _InFloat32 if widened else nullcontext
    bound = _EXACT if widened or not narrow else _COARSE
    with in_float32(), _short_windows(model, config) as shortened:
        exact = _own(model, texts, ours)
        EquivalenceCheck(who, texts, exact, bound, wide=bound == _EXACT).check(forward, slots=2)
    if shortened:
        with in_float32():
            exact = _own(model, texts, ours)
    if not widened:
        return EquivalenceCheck(who, texts, exact, bound, wide=bound == _EXACT)
    rounding = float(_distance(_own(model, texts, ours), exact).median())
    return EquivalenceCheck(who, texts, exact, max(_COARSE, _SLACK * rounding), wide=False)


def _texts(vocabulary: int, length: int) -> IntArray:
    """Return tokens [3, length], the second and third text alike but for the last two; no special token, as a rule."""
    first, count = vocabulary // 8, max(vocabulary // 4, 4)
    plain, shared = (first + (np.arange(length) * step + step) % count for step in (7, 5))
    other = shared.copy()
    other[-_BEHIND:] = first + (shared[-_BEHIND:] - first + 1 + np.arange(_BEHIND)) % count
    return np.stack([plain, shared, other]).astype(np.int64) % vocabulary


def _own(model: PreTrainedModel, texts: IntArray, ours: str) -> Tensor:
    """Return the logits [3 * n, vocab] of the texts in transformers' own forward, in float32 or what comes."""
    model.set_attn_implementation("eager")
    try:
        with as_model_refused(f"transformers' own forward of {type(model).__name__} fails", ranks=model.tp_size or 1):
            logits = model(input_ids=torch.from_numpy(texts).to(input_device(model)), use_cache=False).logits
    finally:
        model.set_attn_implementation(ours)
    found: Tensor = logits.flatten(0, 1).float().cpu()  # it stays as long as the model: not on a GPU
    if found.isnan().any():
        raise ModelRefused(f"transformers' own forward of {type(model).__name__} gives NaN; its weights are damaged")
    return found


def _distances(proof: EquivalenceCheck, forward: Forward, slots: int, defined: int | None) -> dict[str, Tensor]:
    """Return how far each row of the packed texts is from what it should be, by the kind of rows."""
    found: dict[str, list[Tensor]] = {}
    for segments, expected in _steps(proof.texts, slots):
        logits = forward(segments).float().cpu()
        rows = iter(torch.split(logits, [len(places) for places in expected]))
        for segment, places, row in zip(segments, expected, rows, strict=True):
            kind = "draft trees" if segment.visible is not None else "plain rows"
            exact = proof.exact[torch.from_numpy(places)]
            found.setdefault(kind, []).append(_distance(row, exact if defined is None else exact[:, :defined]))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


def _distance(rows: Tensor, exact: Tensor) -> Tensor:
    """Return [n] how far rows are from the exact ones, of the spread of those; what both mask is left out."""
    numbers = exact.abs() < _NOTHING
    apart = torch.where((rows == exact) | ~(numbers | (rows.abs() < _NOTHING)), 0.0, rows - exact)
    plain = torch.where(numbers, exact, 0.0)
    mean = plain.sum(1, keepdim=True) / numbers.sum(1, keepdim=True).clamp(min=1)
    spread = torch.where(numbers, exact - mean, 0.0).norm(dim=1)
    found: Tensor = apart.norm(dim=1) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    return found


def _steps(texts: IntArray, slots: int) -> Iterator[tuple[list[Segment], list[IntArray]]]:
    """Yield forwards over the texts, with the rows of [3 * n] that each of their segments is to give.

    With two slots the plain text lies beside the one with the tree; with one it is left out.
    """
    plain, shared, other = texts
    length = len(plain)
    root = length - _BEHIND - 1
    at = np.arange(length)
    tree = _tree(slots - 1, root, [shared[root], shared[root + 1], other[root + 1], shared[-1], other[-1]])
    below = np.array([root, root + 1, length + root + 1, root + 2, length + root + 2])
    reading = [_whole(slots - 1, 0, shared[:root])]
    expected = [length + at[:root]]
    deciding, then = [tree], [length + below]
    if slots > 1:
        reading, expected = [_whole(0, 0, plain[:-1]), *reading], [at[:-1], *expected]
        deciding, then = [_whole(0, length - 1, plain[-1:]), *deciding], [at[-1:], *then]
    yield reading, expected
    yield deciding, then


def _whole(slot: int, cached: int, ids: IntArray) -> Segment:
    """Return a chain that keeps every row."""
    return replace(chain(slot, cached, ids.tolist(), keep_last=True), keep=np.arange(len(ids)))


def _tree(slot: int, root: int, ids: Sequence[int]) -> Segment:
    """Return the rows of a root with two children, each with one of its own."""
    seen = np.eye(5, dtype=np.bool_)
    seen[:, 0] = seen[3, 1] = seen[4, 2] = True
    positions = root + np.array([0, 1, 1, 2, 2])
    return Segment(slot, root, root, np.asarray(ids, np.int64), positions, seen, np.arange(5))


def _sliding(config: PretrainedConfig, positions: int) -> frozenset[int]:
    """Return the layers whose texts outgrow their sliding window, by the configuration."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * int(config.num_hidden_layers)
    grown = 0 < _window(config) < positions
    return frozenset(layer for layer, kind in enumerate(kinds) if grown and kind == "sliding_attention")


@dataclass(slots=True)
class _Watch:
    """Watches the calls of attention in a forward."""

    who: str
    layers: int
    heads: tuple[int, int]  # KV heads, and numbers of each
    sliding: frozenset[int]  # layers that must say their window
    calls: Counter[int] = field(default_factory=Counter)

    def on(self, plan: AttentionPlan) -> AttentionPlan:
        """Return the plan of a forward that is watched from now on."""
        self.calls.clear()
        return _Watched(plan, self)

    def note(self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> None:
        """Count a call; raises ModelRefused, with what was found, for one that KV slots have no room for."""
        self.calls[layer] += 1
        count, size = self.heads
        if {key.shape[2], value.shape[2], query.shape[2]} != {size} or {key.shape[0], value.shape[0]} != {count}:
            raise ModelRefused(
                f"{self.who} has queries of {query.shape[2]} numbers, {key.shape[0]} keys of {key.shape[2]} and "
                f"{value.shape[0]} values of {value.shape[2]}, and packed decoding keeps {count} of {size} of each, as "
                "its configuration says; choose another model"
            )
        if layer in self.sliding and window is None:
            raise ModelRefused(
                f"{self.who} has a sliding window in its configuration and does not hand it on to attention, which "
                "packed decoding needs; choose another model"
            )

    def refuse_other_than_once_a_layer(self) -> None:
        """Raise ModelRefused, with the counts, unless every layer has attended once in the newest forward."""
        if dict(self.calls) != dict.fromkeys(range(self.layers), 1):
            raise ModelRefused(
                f"{self.who} called attention {self.calls.total()} times in {len(self.calls)} of its {self.layers} "
                "layers, and packed decoding needs one call in each; choose another model"
            )


@dataclass(slots=True)
class _Watched:
    """A plan whose calls are watched."""

    plan: AttentionPlan
    watch: _Watch

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """Take note, and attend."""
        self.watch.note(layer, query, key, value, window)
        return self.plan.attend(layer, query, key, value, scaling, window)


class _InFloat32(TorchFunctionMode):
    """Computes in float32 whatever the weights are: each is widened where it is used, one at a time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch on wide tensors; what only asks for a property needs no copy."""
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
    """Shorten sliding windows to fewer positions than the texts have; yield whether there are any that are longer."""
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
