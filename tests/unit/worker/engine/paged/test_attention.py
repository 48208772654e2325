"""Paged attention and its buckets, on the CPU: they equal dense attention, and padding changes nothing."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import ARCHITECTURES, VOCAB, tiny
from tests.unit.worker.engine.harness import (
    decode,
    engine,
    greedy_and_sampled,
    options,
    outputs,
    plain_texts,
    resumed_after,
    sequences,
    shared_target,
)
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.attention_options import AttentionOptions
from worker.engine.errors import ModelRefused
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.backend import uses_paged_kv
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.paged import rows as paged_rows
from worker.engine.paged.attention import attended, gpu_kernels_for, merged
from worker.engine.paged.cuda_graphs import Captured, CaptureFailed
from worker.engine.paged.kv import PagedKv
from worker.engine.paged.rows import LISTED
from worker.engine.paged.shape_buckets import BucketedForward
from worker.engine.sampling.parameters import Sampling
from worker.engine.segments import KvMove, Segment, chain
from worker.engine.speculation.drafting import Drafter

TEXT = [int(i) for i in np.random.default_rng(0).integers(2, 60, 150)]
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95)
SHORT = 64  # entries of a slot: a prompt, its text and a tree
PARENTS = [-1, 0, 0, 1, 3, 2]  # parents of the nodes of a tree


def model(
    architecture: str = "llama", seed: int = 0, slots: int = 4, paged: bool = True, capacity: int = 176, **options: Any
) -> PackedModel:
    """Return a model with room for TEXT and a tree; a bucket reads all `capacity` entries for each of its rows."""
    network = tiny(architecture, seed)
    network.set_attn_implementation(ATTENTION_NAME)
    return PackedModel(network, slots=slots, capacity=capacity, cpu_kernels=False, paged=paged, **options)


def pages(of: PackedModel) -> PagedKv:
    assert isinstance(of.kv, PagedKv)
    return of.kv


def buckets(of: PackedModel) -> BucketedForward:
    assert of._buckets is not None
    return of._buckets


def small_pages() -> PagedKv:
    return PagedKv(1, 4, 1, 64, 1, torch.float32, torch.device("cpu"), block_size=16)


def tree(slot: int, prefix: int, first: int = 7) -> Segment:
    visible = np.eye(len(PARENTS), dtype=np.bool_)
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            visible[node] |= visible[parent]
    depth = visible.sum(1) - 1
    return Segment(slot, prefix, prefix, first + np.arange(6), prefix + depth, visible, np.arange(6))


def deeper(slot: int, prefix: int) -> Segment:
    """Return two nodes below nodes 4 and 5 of the tree, as a draft model adds them in a later forward."""
    visible = np.zeros((2, 8), np.bool_)
    visible[0, [0, 1, 3, 4, 6]] = visible[1, [0, 2, 5, 7]] = True
    return Segment(slot, prefix, prefix + 6, np.array([20, 21]), prefix + np.array([4, 3]), visible, np.arange(2))


STEPS: dict[str, list[Segment]] = {
    "prompts": [chain(0, 0, TEXT[:50], keep_last=True), chain(1, 0, TEXT[:3], keep_last=True)],
    "one plain row": [chain(0, 50, [5], keep_last=True)],
    "a tree": [tree(0, 50)],
    "below a tree": [deeper(0, 50)],
    "plain rows": [chain(0, 50, [5], keep_last=True), chain(1, 3, [9], keep_last=True)],
    "a tree and a long chunk": [tree(0, 50), chain(1, 3, TEXT[:40], keep_last=True)],
    "a tree, a short chunk and a plain row": [
        tree(0, 50),
        chain(1, 43, TEXT[:4], keep_last=True),
        chain(2, 0, [8], keep_last=False),
    ],
    "a prompt beyond every window": [chain(3, 0, TEXT, keep_last=True)],
    "trees": [tree(0, 50), tree(1, 47), tree(3, 150)],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paged_logits_equal_those_of_dense_attention(architecture: str) -> None:
    plain, ours = model(architecture, paged=False), model(architecture)
    in_buckets = set()
    for name, step in STEPS.items():
        assert torch.allclose(ours.forward(step), plain.forward(step), atol=1e-4), name
        in_buckets.add(buckets(ours).shape_for(step) is not None)
    assert in_buckets == {True, False}


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [(1, 1), (2, 2), (3, 4), (31, 32), (32, 32), (33, 64), (65, 96), (256, 256), (257, 288), (513, 576), (1024, 1024)],
)
def test_rows_take_the_smallest_bucket_that_fits(rows: int, bucket: int) -> None:
    wide = np.eye(rows, dtype=np.bool_)
    siblings = Segment(0, 9, 9, np.zeros(rows, np.int64), np.full(rows, 9), wide, np.arange(rows))
    shape = BucketedForward(lambda rows, _: (rows.ids, None), small_pages()).shape_for([siblings])
    assert shape is not None
    assert shape.rows == bucket


def test_more_rows_than_the_largest_bucket_and_deeper_trees_run_without_a_bucket() -> None:
    ours = BucketedForward(lambda rows, _: (rows.ids, None), small_pages())
    assert ours.shape_for([chain(0, 0, [5] * (LISTED + 1), keep_last=True)]) is None
    assert ours.shape_for([chain(0, 0, [5] * LISTED, keep_last=True)]) is not None
    wide = np.eye(1025, dtype=np.bool_)
    assert ours.shape_for([Segment(0, 9, 9, np.zeros(1025, np.int64), np.full(1025, 9), wide, np.arange(1025))]) is None


@pytest.mark.parametrize(("device", "ranks"), [("cuda", None), ("cuda", 2), ("cpu", None)])
def test_kv_is_paged_on_a_gpu_on_any_number_of_ranks(device: str, ranks: int | None) -> None:
    loaded: Any = SimpleNamespace(device=torch.device(device), tp_size=ranks)
    assert uses_paged_kv(loaded) is (device == "cuda")


def test_a_gpu_without_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "worker.engine.gpu.kernels", None)
    with pytest.raises(ModelRefused, match="pip install triton"):
        gpu_kernels_for(torch.device("cuda"))
    assert gpu_kernels_for(torch.device("cpu")) is None


def test_plain_steps_list_nothing() -> None:
    ours = BucketedForward(lambda rows, _: (rows.ids, None), small_pages())
    plain, drafted = ours.shape_for(STEPS["plain rows"]), ours.shape_for(STEPS["a tree"])
    assert plain is not None
    assert drafted is not None
    assert (plain.listed, drafted.listed) == (0, LISTED)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("step", ["one plain row", "a tree", "a tree, a short chunk and a plain row"])
@pytest.mark.parametrize("bucket", [16, 64])
def test_no_bit_of_a_real_row_depends_on_the_padding(
    monkeypatch: pytest.MonkeyPatch, architecture: str, step: str, bucket: int
) -> None:
    """Give padding rows of the same bucket other tokens, other positions, and a scratch block full of poison."""
    monkeypatch.setattr("worker.engine.paged.shape_buckets.BUCKETS", (bucket,))
    ours = model(architecture, capacity=64)
    for before in ("prompts", "a tree and a long chunk"):
        ours.forward(STEPS[before])
    expected = ours.forward(STEPS[step])
    rows = sum(len(s.ids) for s in STEPS[step])
    pages(ours).poison_free()

    def spoilt(segments: list[Segment], kv: PagedKv, shape: object) -> object:
        flat = paged_rows.laid_out(segments, kv, shape)  # type: ignore[arg-type]
        flat[rows:bucket] = 33
        flat[bucket + rows : 2 * bucket] = 77
        return flat

    monkeypatch.setattr("worker.engine.paged.shape_buckets.laid_out", spoilt)
    assert torch.equal(ours.forward(STEPS[step]), expected)


def test_captures_write_to_the_scratch_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.engine.paged.shape_buckets.BUCKETS", (1, 8, 48))
    ours = model()
    ours.forward(STEPS["prompts"])
    before = [store.clone() for store in (pages(ours).keys, pages(ours).values)]
    ours.prepare()
    for store, was in zip((pages(ours).keys, pages(ours).values), before, strict=True):
        assert torch.equal(store[:, 1:], was[:, 1:])
    assert {(shape.rows, shape.listed) for shape in buckets(ours)._replays} == {
        (1, 0), (8, 0), (1, LISTED), (8, LISTED), (48, LISTED)
    }  # fmt: skip


def capturing(ours: PackedModel, capture: Any) -> BucketedForward:
    ours._buckets = BucketedForward(ours._call_paged, pages(ours), capture)
    return ours._buckets


def test_steps_of_every_size_find_a_captured_forward_when_the_memory_for_captures_is_spent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.engine.paged.shape_buckets.BUCKETS", (1, 2, 4, 6, 8))
    monkeypatch.setattr("worker.engine.paged.shape_buckets.GRAPH_BYTES", 3)
    ours = model(slots=8)
    bucketed = capturing(ours, lambda work: Captured(work, bytes=1))
    bucketed.prepare()
    assert [shape.rows for shape in bucketed._replays] == [8, 8, 4]
    plain = [chain(slot, 0, [5], keep_last=True) for slot in range(5)]
    for count, rows in ((1, 4), (4, 4), (5, 8)):
        shape = bucketed.shape_for(plain[:count])
        assert shape is not None
        assert shape.rows == rows


def test_a_forward_that_can_not_be_captured_runs_and_is_reported() -> None:
    ours, plain = model(), model(paged=False)

    def capture(work: object) -> object:
        raise CaptureFailed("out of memory")

    capturing(ours, capture)
    step = [chain(0, 0, [5], keep_last=True)]
    assert torch.allclose(ours.forward(step), plain.forward(step), atol=1e-4)
    assert ours.capture_failures == {"1 rows": "out of memory"}


def test_a_captured_forward_reads_the_input_buffer_when_it_is_replayed() -> None:
    """A capture keeps nothing of its first step: it is made once, and replays steps in any order."""
    ours, plain = model(), model(paged=False)
    made = []

    def capture(work: Any) -> Captured[Any]:
        made.append(work)
        return Captured(work)

    capturing(ours, capture)
    for name in ("prompts", "a tree and a long chunk"):
        ours.forward(STEPS[name])
        plain.forward(STEPS[name])
    for round_ in range(3):
        for step in ([tree(0, 50, 7 + round_)], [chain(1, 43, [5 + round_], keep_last=True)]):
            assert torch.allclose(ours.forward(step), plain.forward(step), atol=1e-4)
    assert len(made) == 2


def test_logits_outlive_the_next_replay() -> None:
    ours = model()
    ours.forward(STEPS["prompts"])
    still: dict[str, Tensor] = {}

    def capture(work: Any) -> Captured[Any]:
        def replay() -> tuple[Tensor, None]:
            logits = work()[0]
            still.setdefault("output", torch.empty_like(logits)).copy_(logits)
            return still["output"], None

        return Captured(replay)

    capturing(ours, capture)
    first = ours.forward(STEPS["one plain row"])
    kept = first.clone()
    ours.forward([chain(0, 50, [31], keep_last=True)])
    assert torch.equal(first, kept)


def test_merged_parts_are_the_attention_over_both() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(5, 6, 8), torch.randn(5, 11, 2, 8), torch.randn(5, 11, 2, 8)
    visible = torch.rand(5, 11) < 0.5
    visible[:, 3] = True
    visible[1, 4:] = False  # nothing of the second part
    whole, _ = attended(query, keys, values, visible, AttentionOptions(0.3))
    parts = [
        attended(query, keys[:, at], values[:, at], visible[:, at], AttentionOptions(0.3))
        for at in (slice(4), slice(4, 11))
    ]
    assert torch.allclose(merged(parts[0], parts[1])[0], whole, atol=1e-6)


def drafter(kind: str, paged: bool = True) -> Drafter | None:
    if kind == "model":
        draft = model(seed=1, slots=6, capacity=SHORT) if paged else shared_target(seed=1)
        return ModelDrafter(draft, kind, VOCAB)
    return SuffixDrafter() if kind == "suffix" else None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paged_texts_equal_plain_ones(architecture: str) -> None:
    for kind, mode in (("suffix", Mode.PAPER), ("model", Mode.OPT_TREE)):
        some, ours = greedy_and_sampled(SAMPLED), model(architecture, slots=6, capacity=SHORT)
        pages(ours).poison_free()
        draft = drafter(kind, paged=architecture == "llama")  # dense ones, which are fused, are faster
        decode(engine(ours, draft, options(mode, max_sequences=6)), some[::-1])
        assert outputs(some) == plain_texts(architecture, sampling=SAMPLED, both=True)
        pages(ours).check()


def test_paged_texts_equal_plain_ones_without_drafts() -> None:
    some, ours = greedy_and_sampled(SAMPLED), model("gemma3", capacity=SHORT)
    pages(ours).poison_free()
    decode(engine(ours, None, options(Mode.PLAIN)), some[::-1])
    assert outputs(some) == plain_texts("gemma3", sampling=SAMPLED, both=True)
    pages(ours).check()


def test_paged_sequences_resume_from_their_tokens() -> None:
    whole = plain_texts(sampling=SAMPLED)
    resumed = resumed_after(5, whole, sequences(sampling=SAMPLED))
    decode(engine(model(capacity=SHORT), drafter("model"), options(Mode.PAPER)), resumed)
    assert outputs(resumed) == whole


@pytest.mark.parametrize("prefill_rows", [7, 500])
def test_shared_prefixes_change_no_text_in_paged_kv(prefill_rows: int) -> None:
    system = [2 + i % 37 for i in range(40)]
    prompts = [[*system, 7, 8], [*system, 9], [*system[:25], 11, 12, 13], [*system, 7, 8], [20, 21], system]
    alone = sequences(prompts, max_tokens=4)
    dense = engine(shared_target(), None, options(Mode.PLAIN, prefill_rows=64))
    for sequence in alone:
        decode(dense, [sequence])
        dense.forget(sequence.slot)
    ours = model(capacity=SHORT)
    running = engine(ours, drafter("model"), options(Mode.PAPER, prefill_rows=prefill_rows))
    for _ in range(2):  # the second time from cached prefixes
        together = sequences(prompts, max_tokens=4)
        decode(running, together)
        assert outputs(together) == outputs(alone)
        pages(ours).check()


@pytest.mark.parametrize("seed", range(2))
def test_blocks_add_up_under_random_arrivals_and_cancellations(seed: int) -> None:
    rng = random.Random(seed)
    # Enough for two or three sequences, and for cached prefixes until their memory is needed.
    ours = model(slots=4, kv_tokens=160, capacity=SHORT)
    draft = model(seed=1, slots=4, capacity=SHORT)
    running = engine(
        ours, ModelDrafter(draft, "model", VOCAB), options(Mode.PAPER, max_sequences=4, kv_tokens=160, page_tokens=16)
    )
    some = sequences()
    waiting = list(some)
    while waiting or running.busy:
        if waiting and rng.random() < 0.5:
            running.add(waiting.pop())
        if rng.random() < 0.1:
            running.cancel({rng.randrange(len(some))})
        running.step()
        for paged in (ours, draft):
            pages(paged).check()
            pages(paged).poison_free()
    assert not pages(draft).pool.used, "a draft model keeps no entries of finished sequences"
    for sequence, whole in zip(some, plain_texts(), strict=True):
        assert sequence.output_ids == whole[: len(sequence.output_ids)]


@pytest.mark.parametrize("step", ["prompts", "a tree, a short chunk and a plain row"])
def test_hidden_states_are_tapped_from_real_rows_only(step: str) -> None:
    states = []
    for paged in (False, True):
        tapped = model(paged=paged, tapped=(0, 1))
        tapped.forward(STEPS["prompts"])
        tapped.forward([chain(1, 3, TEXT[:40], keep_last=True)])
        tapped.forward(STEPS[step])
        assert tapped.hidden is not None
        states.append(torch.cat([tapped.hidden.read(s.slot, 0, s.end) for s in STEPS[step]]))
    assert torch.allclose(states[0], states[1], atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_accepted_path_moved_down_equals_a_fresh_prefill(architecture: str) -> None:
    ours = model(architecture)
    ours.forward([chain(1, 0, TEXT[:10], keep_last=True)])
    ours.forward([tree(1, 10)])
    ours.compact([KvMove(1, 11, np.array([11, 13, 14]))])
    after = ours.forward([chain(1, 14, [17], keep_last=True)])[0]
    fresh = ours.forward([chain(0, 0, [*TEXT[:10], 7, 8, 10, 11, 17], keep_last=True)])[0]
    assert torch.allclose(after, fresh, atol=1e-4)
