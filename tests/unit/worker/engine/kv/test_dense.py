"""Laws of KV slots and attention: rows see only their own sequence, freed slots leak nothing, slot counts add up."""

from __future__ import annotations

import os
import random
import sys
from array import array
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.models import ARCHITECTURES, packed, tiny
from tests.unit.worker.engine.harness import (
    PROMPTS,
    decode,
    drafter,
    engine,
    options,
    outputs,
    plain_texts,
    sequences,
    shared_target,
)
from worker.engine.errors import ModelRefused, OutOfSlots
from worker.engine.kv import dense
from worker.engine.kv.dense import DenseKv, lazy_zeros
from worker.engine.kv.slot_allocator import SlotAllocator
from worker.engine.model.architecture import (
    batch_dependent_rope,
    has_long_factors,
    max_positions,
    refuse_unsupported,
    use_long_factors,
)
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.segments import KvMove, Segment, chain

# A tree with two branches below the root: rows 0 -> 1 -> 3 and 0 -> 2 -> 4.
PARENTS = [-1, 0, 0, 1, 2]
TREE_IDS = [7, 8, 9, 10, 11]
PREFIX = [2, 3, 4, 5, 6, 12, 13, 14, 15, 16]


def tree_segment(slot: int, broken: bool = False) -> Segment:
    seen = np.eye(len(PARENTS), dtype=np.bool_)
    depth = np.zeros(len(PARENTS), np.int64)
    for i, parent in enumerate(PARENTS):
        if parent >= 0:
            seen[i] |= seen[parent]
            depth[i] = depth[parent] + 1
    if broken:
        seen[4, 3] = True
    n = len(PREFIX)
    return Segment(slot, n, n, np.array(TREE_IDS), n + depth, seen, np.arange(len(PARENTS)))


def path_logits(model: PackedModel, row: int) -> torch.Tensor:
    path = []
    while row >= 0:
        path.append(TREE_IDS[row])
        row = PARENTS[row]
    return model.forward([chain(3, 0, PREFIX + path[::-1], keep_last=True)])[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tree_rows_equal_separate_forwards_of_their_paths(architecture: str) -> None:
    model = packed(tiny(architecture))
    model.forward([chain(1, 0, PREFIX, keep_last=False), chain(2, 0, [20, 21, 22], keep_last=True)])
    rows = model.forward([tree_segment(1), chain(2, 3, [23], keep_last=True)])
    for row in range(len(PARENTS)):
        assert torch.allclose(rows[row], path_logits(model, row), atol=1e-4)


def test_a_wrong_ancestor_changes_the_logits() -> None:
    model = packed(tiny())
    model.forward([chain(1, 0, PREFIX, keep_last=True)])
    rows = model.forward([tree_segment(1, broken=True)])
    assert not torch.allclose(rows[4], path_logits(model, 4), atol=1e-2)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_an_accepted_path_moved_down_equals_a_fresh_prefill(architecture: str) -> None:
    model = packed(tiny(architecture))
    n = len(PREFIX)
    model.forward([chain(1, 0, PREFIX, keep_last=True)])
    model.forward([tree_segment(1)])
    model.compact([KvMove(1, n + 1, np.array([n + 2, n + 4]))])
    after = model.forward([chain(1, n + 3, [17], keep_last=True)])[0]
    fresh = model.forward([chain(0, 0, [*PREFIX, 7, 9, 11, 17], keep_last=True)])[0]
    assert torch.allclose(after, fresh, atol=1e-4)


def test_overlapping_moves_copy_what_was_there_before() -> None:
    cache = DenseKv(1, 2, 1, 8, 1, torch.float32, torch.device("cpu"))
    cache.keys[0, 1, :, 0, 0] = torch.arange(8.0)
    cache.compact([KvMove(1, 2, np.array([3, 4, 6]))])
    assert cache.keys[0, 1, :, 0, 0].tolist() == [0, 1, 3, 4, 6, 5, 6, 7]


def test_freed_slots_leak_nothing_into_later_texts() -> None:
    model = packed(tiny(), slots=2)
    for slot in range(2):
        model.kv.poison(slot)
    for _ in range(2):
        some = sequences()
        decode(engine(model, drafter("random"), options(Mode.PAPER, max_sequences=2)), some)
        assert outputs(some) == plain_texts()
        model.kv.poison(0)


def test_what_a_text_left_in_memory_that_cannot_be_given_back_reaches_no_later_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "_LIBC", None)  # as on a GPU
    model = tiny("llama")
    model.set_attn_implementation(ATTENTION_NAME)
    target = PackedModel(model, slots=2, capacity=64, cpu_kernels=False, paged=False)

    def next_logits() -> torch.Tensor:
        target.forward([chain(0, 0, [2, 3], keep_last=True), chain(1, 0, list(range(2, 6)), keep_last=True)])
        return target.forward([chain(0, 2, [4], keep_last=True), chain(1, 4, [5], keep_last=True)])

    fresh = next_logits()
    target.kv.poison(0)
    target.truncate(0, 0)
    assert torch.equal(next_logits(), fresh), "the longer neighbour makes them share one padded product"


@pytest.mark.parametrize("seed", range(4))
def test_slots_add_up_under_random_arrivals_and_cancellations(seed: int) -> None:
    rng = random.Random(seed)
    running = engine(packed(tiny(), slots=3), drafter("suffix"), options(Mode.PAPER, max_sequences=3))
    some = sequences()
    waiting = list(some)
    cancelled: set[object] = set()
    while waiting or running.busy:
        if waiting and rng.random() < 0.5:
            running.add(waiting.pop())
        if rng.random() < 0.1:
            key = rng.randrange(len(some))
            cancelled.add(key)
            running.cancel({key})
        running.step()
        held = [s for s in some if s.slot >= 0 and not s.finished]
        assert running.free_slots + len(held) == 3
        assert len({s.slot for s in held}) == len(held)
    for ours, theirs in zip(some, plain_texts(), strict=True):
        assert ours.output_ids == theirs[: len(ours.output_ids)]
        assert ours.finish_reason is not None or ours.key in cancelled


def test_the_lowest_slot_is_allocated_first_and_no_more_than_there_are() -> None:
    slots, ids = SlotAllocator(2, 10), array("i", [5])
    assert [slots.allocate(ids, 0), slots.allocate(ids, 0)] == [(0, 0), (1, 0)]
    with pytest.raises(OutOfSlots):
        slots.allocate(ids, 0)
    slots.free(0, ids, 0)
    assert slots.allocate(ids, 0) == (0, 0)


def test_prompts_longer_than_a_chunk_are_read_in_chunks() -> None:
    long = [[2 + i % 50 for i in range(60)], *PROMPTS]
    some, whole = sequences(long), sequences(long)
    decode(engine(shared_target(), None, options(Mode.PLAIN, prefill_rows=7)), some)
    decode(engine(shared_target(), None, options(Mode.PLAIN, prefill_rows=500)), whole)
    assert outputs(some) == outputs(whole)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64},
        {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 64}},
    ],
)
def test_rotary_embeddings_that_depend_on_the_batch_limit_the_positions(rope: dict[str, Any]) -> None:
    config = tiny().config
    config.rope_parameters = rope
    refuse_unsupported(config)
    assert max_positions(config) == 64
    assert batch_dependent_rope(config) in ("dynamic", "longrope")


def test_the_long_factors_of_longrope_hold_for_any_length_if_longer_texts_are_wanted() -> None:
    config = tiny().config
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "short_mscale": 1.1, "long_mscale": 1.2}
    config.rope_parameters = rope | {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    assert not use_long_factors(config, 0)
    assert not use_long_factors(config, 64)
    assert not has_long_factors(config)
    assert use_long_factors(config, 65)
    assert has_long_factors(config)
    assert config.rope_parameters["short_factor"] == [4.0] * 16
    assert config.rope_parameters["short_mscale"] == 1.2
    assert max_positions(config) == config.max_position_embeddings
    assert batch_dependent_rope(config) is None


def test_rotary_embeddings_that_do_not_depend_on_the_batch_have_all_positions() -> None:
    config = tiny().config
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 10_000.0, "original_max_position_embeddings": 64}
    assert max_positions(config) == config.max_position_embeddings
    assert batch_dependent_rope(config) is None


def test_layers_that_are_not_attention_are_refused() -> None:
    config = tiny().config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ModelRefused, match="linear_attention"):
        refuse_unsupported(config)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
def test_a_short_text_commits_little_of_its_slot() -> None:
    """Memory is committed in small pages when written: one element of each head must not commit the whole slot."""
    before = _resident_bytes()
    slot = lazy_zeros((64, 1 << 20), torch.bfloat16, torch.device("cpu"))
    slot[:, 0] = 1.0
    assert _resident_bytes() - before < slot.nbytes / 8
    assert float(slot[:, :8].sum()) == 64.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_the_memory_behind_a_truncated_text_is_given_back(kernels: bool) -> None:
    """Pages that are counted as free are free: or texts that took turns in all slots would fill each."""
    network = tiny()
    network.set_attn_implementation(ATTENTION_NAME)
    model = PackedModel(network, slots=2, capacity=16_384, cpu_kernels=kernels)
    kv = cast(DenseKv, model.kv)
    model.forward([chain(1, 0, PREFIX, keep_last=True)])
    expected = model.forward([chain(1, len(PREFIX), [7], keep_last=True)])
    before = _resident_bytes()
    for store in (kv.keys, kv.values):
        store[:, 0] = 1.0
    written = kv.keys[:, 0].numel() * 2 * kv.keys.element_size()
    assert _resident_bytes() - before > 0.9 * written
    model.truncate(0, 5)
    assert _resident_bytes() - before < 0.1 * written
    model.truncate(1, len(PREFIX))
    assert torch.equal(model.forward([chain(1, len(PREFIX), [7], keep_last=True)]), expected), "the text stays"


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
