"""Laws of memory that runs out: texts are the same under any preemption, pages add up, and every sequence ends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import VOCAB, TableModel, packed, tiny
from tests.unit.worker.engine.harness import decode, engine, options, outputs, plain_texts, sequences, shared_target
from worker.drafters.model import ModelDrafter
from worker.drafters.suffix.drafter import SuffixDrafter
from worker.engine.admission import MAX_PREEMPTIONS, is_reserved, peak_pages
from worker.engine.engine import Engine
from worker.engine.errors import SequenceTooLong
from worker.engine.model.attention import ATTENTION_NAME
from worker.engine.model.packed_model import PackedModel
from worker.engine.options import Mode
from worker.engine.output_lengths import PRIOR_TOKENS, OutputLengths
from worker.engine.paged.kv import PagedKv
from worker.engine.sampling.parameters import Sampling
from worker.engine.sequence import Sequence
from worker.engine.speculation.drafting import Drafter
from worker.engine.stats import StepBatch

SYSTEM = [2 + i % 37 for i in range(20)]
PROMPTS = [[*SYSTEM, 7, 8], [3, 4, 5], [*SYSTEM, 9], [20, 21, 22, 23, 24, 25], [*SYSTEM, 7, 8], [11], [30, 31]]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.9, top_k=20, top_p=0.95),
    Sampling(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.4),
]
EOS = [5, 6]
PAGE = 16  # tokens of a block of paged KV on a CPU


def model(store: str, seed: int = 0, kv_tokens: int | None = None) -> PackedModel:
    """A tiny model in one of the memory layouts."""
    network = tiny(seed=seed)
    if store == "fused":
        return packed(network)
    network.set_attn_implementation(ATTENTION_NAME)
    return PackedModel(network, slots=4, capacity=96, cpu_kernels=False, paged=store == "paged", kv_tokens=kv_tokens)


def mixed() -> list[Sequence]:
    """Greedy, sampled and penalised sequences."""
    some = sequences(PROMPTS, eos_ids=EOS)
    for index, sequence in enumerate(some):
        sequence.sampling = replace(SAMPLINGS[index % 3], key=sequence.sampling.key)
    return some


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    """What plain decoding with enough memory writes."""
    some = mixed()
    decode(engine(shared_target(), None, options(Mode.PLAIN)), some)
    return outputs(some)


@pytest.fixture
def rash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission that expects each answer to end with the next token, so that memory runs out."""
    monkeypatch.setattr(OutputLengths, "expected", lambda _, group, decoded: np.array(decoded, np.int64) + 1)


def drafter(kind: str, draft: PackedModel) -> Drafter | None:
    if kind == "model":
        return ModelDrafter(draft, kind, VOCAB)
    return SuffixDrafter() if kind == "suffix" else None


def check_pages(running: Engine, *models: PackedModel) -> None:
    """Assert that pages add up and that stores take no more than was counted."""
    slots = running._scheduler.slots
    assert slots.free_pages + slots.used_pages == slots.pages
    assert 0 <= slots.free_pages <= slots.pages
    assert slots.used_pages == sum(slots.pages_of(slot) for slot in range(slots.count))
    for one in models:
        if isinstance(one.kv, PagedKv):
            one.kv.check()
            one.kv.poison_free()
            assert all(len(one.kv.blocks_of(slot)) <= slots.pages_of(slot) for slot in range(slots.count))


@pytest.mark.usefixtures("rash")
@pytest.mark.parametrize("kind", ["none", "suffix", "model"])
@pytest.mark.parametrize("store", ["dense", "paged", "fused"])
def test_texts_are_the_same_under_any_preemption(store: str, kind: str, plain: list[list[int]]) -> None:
    rng = random.Random(f"{store} {kind}")
    page_tokens = PAGE if store == "paged" else 1
    kv_tokens = PAGE * rng.choice([3, 4, 5]) if store == "paged" else rng.choice([40, 50, 64, 90])
    target = model(store, kv_tokens=kv_tokens)
    # Paged memory of a draft runs out, too; dense memory does not, so the draft has the faster one.
    draft = model("paged" if store == "paged" else "fused", seed=rng.choice([0, 1]), kv_tokens=7 * PAGE)
    mode = {"none": Mode.PLAIN, "suffix": Mode.OPT_TREE, "model": Mode.PAPER}[kind]
    rows = rng.choice([7, 50])
    chosen = options(mode, kv_tokens=kv_tokens, page_tokens=page_tokens, prefill_rows=rows, max_sequences=4)
    running = engine(target, drafter(kind, draft), chosen)
    some = mixed()
    waiting = list(some)
    for _ in range(600):
        if waiting and rng.random() < 0.5:
            running.add(waiting.pop(0))
        movable = [s for s in running._scheduler._running if not is_reserved(s)]
        if movable and rng.random() < 0.15:
            victim = rng.choice(movable)
            slot = victim.slot
            running._scheduler._preempt(victim)
            if rng.random() < 0.5:  # its entries are evicted at once
                running._scheduler.slots.drop_prefix(slot)
        running.step()
        check_pages(running, target)
        if not waiting and not running.busy:
            break
    assert outputs(some) == plain
    assert all(s.preemptions <= MAX_PREEMPTIONS for s in some)
    assert sum(s.preemptions for s in some) > 1
    assert not isinstance(draft.kv, PagedKv) or not draft.kv.pool.used, "a draft keeps no lost slot"


def rising(text: tuple[int, ...]) -> Tensor:
    logits = torch.zeros(VOCAB)
    logits[(text[-1] + 1) % VOCAB] = 5.0
    return logits


def run(running: Engine, some: list[Sequence], limit: int) -> list[StepBatch]:
    """Decode to the end; return the results of each step."""
    for sequence in some:
        running.add(sequence)
    results: list[StepBatch] = []
    while running.busy:
        results.append(running.step())
        check_pages(running)
        assert len(results) <= limit, "some sequence starves"
    return results


@pytest.mark.usefixtures("rash")
@pytest.mark.parametrize("seed", range(3))
def test_every_sequence_ends_and_none_is_preempted_beyond_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    some = [
        *sequences([[3 + i, 9, *range(rng.randrange(1, 20))] for i in range(25)], max_tokens=rng.randrange(10, 60)),
        *sequences([[2 + i % 50 for i in range(30)]], max_tokens=70),
    ]
    for index, sequence in enumerate(some):
        sequence.key, sequence.group = index, index % 3
    model_ = TableModel(rising)
    running = engine(model_, None, options(Mode.PLAIN, kv_tokens=100, max_sequences=8, prefill_rows=30))
    results = run(running, some, limit=sum(s.max_length for s in some))
    assert all(len(s.output_ids) == s.max_tokens for s in some)
    assert max(s.preemptions for s in some) <= MAX_PREEMPTIONS
    assert running.preemptions == sum(s.preemptions for s in some) > 0
    assert running.preemptions == sum(int(result.preemptions.sum()) for result in results)
    assert running.recomputed_tokens == sum(row.stats.recomputed_tokens for result in results for row in result)
    total = sum(s.max_length - 1 for s in some)
    assert model_.rows <= total + running.recomputed_tokens, "what is computed twice is counted"


@pytest.mark.usefixtures("rash")
def test_the_oldest_sequence_is_never_preempted_while_a_younger_one_can_be() -> None:
    running = engine(TableModel(rising), None, options(Mode.PLAIN, kv_tokens=60, max_sequences=8))
    some = sequences([[3 + i, 9] for i in range(8)], max_tokens=40)
    run(running, some, limit=400)
    assert some[0].preemptions == 0
    assert running.preemptions > 0


def test_answers_that_end_early_are_decoded_together_whatever_max_tokens_is() -> None:
    def ends(text: tuple[int, ...]) -> Tensor:
        logits = torch.zeros(VOCAB)
        logits[5 if len(text) % 10 == 9 else 8] = 5.0
        return logits

    running = engine(TableModel(ends), None, options(Mode.PLAIN, kv_tokens=200, max_sequences=16, max_context=200))
    some = sequences([[9 + i % 40, 2 + i // 40, 3] for i in range(60)], max_tokens=180, eos_ids=[5])
    results = run(running, some, limit=400)
    assert max(map(len, results)) >= 10, "a reservation of max_tokens holds one"
    assert running.recomputed_tokens <= 0.05 * sum(len(s.ids) for s in some)


def test_a_recomputed_prefix_that_a_neighbour_holds_is_shared() -> None:
    model_ = TableModel(rising)
    running = engine(model_, None, options(Mode.PLAIN, kv_tokens=400, prefill_rows=500))
    first, second = sequences([[*SYSTEM, *SYSTEM, 7]] * 2, max_tokens=30)
    for sequence in (first, second):
        running.add(sequence)
    while len(second.output_ids) < 5:
        running.step()
    slots = running._scheduler.slots
    slot, rows = second.slot, model_.rows
    running._scheduler._preempt(second)
    slots.drop_prefix(slot)  # its own entries are gone
    running._scheduler._recheck_in = 0
    running.step()
    assert model_.rows - rows == 2, "one row each: its neighbour has the same text"
    while running.busy:
        running.step()
    assert outputs([first]) == outputs([second])
    assert running.recomputed_tokens < 10


def test_a_sequence_that_can_never_fit_is_refused_with_what_fits() -> None:
    running = engine(TableModel(rising), None, options(Mode.PLAIN, kv_tokens=60))
    with pytest.raises(SequenceTooLong, match=r"need 71 tokens of KV memory, and 60 fit"):
        running.add(sequences([[3]], max_tokens=70)[0])
    some = sequences([[3]], max_tokens=59)
    run(running, some, limit=70)
    assert len(some[0].output_ids) == 59


def test_a_draft_without_memory_drafts_for_fewer_sequences() -> None:
    draft = model("paged", kv_tokens=5 * PAGE)
    some = sequences()
    results = decode(engine(shared_target(), ModelDrafter(draft, "model", VOCAB), options(Mode.PAPER)), some)
    assert outputs(some) == plain_texts()
    assert any(result.stats.accepted_tokens for result in results)
    cast(PagedKv, draft.kv).check()


def test_a_draft_follows_a_sequence_to_another_slot() -> None:
    draft = model("paged")
    target = model("paged")
    running = engine(target, ModelDrafter(draft, "model", VOCAB), options(Mode.PAPER, page_tokens=PAGE))
    first, second = sequences(PROMPTS[:2], max_tokens=30)
    for sequence in (first, second):
        running.add(sequence)
    while len(second.output_ids) < 8:
        running.step()
    slot = second.slot
    running._scheduler._preempt(second)
    running.cancel({first.key})
    check_pages(running, target)
    for one in range(2):
        running.forget(one)
    accepted = 0
    while running.busy:
        accepted += int(running.step().accepted_tokens.sum())
    assert second.slot != slot
    assert accepted > 10, "the draft is the target itself"
    assert not cast(PagedKv, draft.kv).pool.used


def test_trees_shrink_to_the_pages_that_are_left() -> None:
    running = engine(TableModel(rising), SuffixDrafter(), options(Mode.PAPER, kv_tokens=30, nodes=12))
    some = sequences([[3, 4, 5, 3, 4, 5, 3]], max_tokens=20)
    results = decode(running, some)
    assert len(some[0].output_ids) == 20
    check_pages(running)
    assert all(result.stats.tree_nodes <= 30 - 7 for result in results)


def test_expected_lengths_are_a_high_quantile_of_what_has_ended() -> None:
    lengths = OutputLengths()
    assert lengths.expected("job", [0, 10]).tolist() == [PRIOR_TOKENS, PRIOR_TOKENS]
    for tokens in range(1, 101):
        lengths.learn("job", tokens)
    assert lengths.expected("job", [0]).tolist() == [85]
    assert lengths.expected("job", [50]).tolist() == [93], "given what is decoded already"
    assert lengths.expected("job", [400])[0] > 400
    assert lengths.expected("other job", [0])[0] == PRIOR_TOKENS


def test_answers_that_are_still_decoded_count_as_longer_ones() -> None:
    lengths = OutputLengths()
    for _ in range(10):
        lengths.learn("job", 10)
    assert lengths.expected("job", [0]).tolist() == [10]
    assert lengths.expected("job", [0, *[60] * 30])[0] >= 60, "most answers are longer than those that ended first"


def test_the_peak_is_the_most_pages_that_are_taken_at_one_time() -> None:
    rng = random.Random(0)
    for _ in range(50):
        now = [rng.randrange(1, 30) for _ in range(5)]
        growth = [rng.randrange(0, 30) for _ in range(5)]
        peak = max(sum(n + t for n, g in zip(now, growth, strict=True) if g >= t) for t in range(31))
        import numpy as np

        assert peak_pages(np.array(now), np.array(now) + np.array(growth)) == peak
