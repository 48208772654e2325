"""Laws of the scheduler: KV memory adds up, a long prompt delays no short one, decoding never waits."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import TableModel
from tests.unit.worker.engine.harness import decode, engine, options, sequences
from tests.unit.worker.engine.test_sharing import last_token
from worker.engine.options import Mode
from worker.engine.scheduler import Scheduler

ACTIONS = st.lists(st.tuples(st.sampled_from(["add", "cancel", "step"]), st.integers(0, 30)), max_size=60)


@settings(deadline=None, max_examples=60)
@given(ACTIONS)
def test_free_and_used_tokens_add_up_and_every_sequence_is_served(actions: list[tuple[str, int]]) -> None:
    chosen = options(Mode.PLAIN, kv_tokens=150, max_sequences=6)
    running = engine(TableModel(last_token), None, chosen)
    slots = running._scheduler.slots
    some = sequences([[2 + i % 7] * (1 + i) for i in range(31)], max_tokens=9)
    added = set()
    for action, index in [*actions, *[("end", 0)] * 2000]:
        if action == "end" and not running.busy:
            break
        if action == "add" and index not in added:
            added.add(index)
            running.add(some[index])
        elif action == "cancel":
            running.cancel({index})
        else:
            running.step()
        held = [s for s in some if s.slot >= 0 and not s.finished]
        assert slots.used_pages + slots.free_pages == slots.pages == 150
        assert slots.free_pages >= 0
        assert sum(s.cached for s in held) <= slots.used_pages
        assert slots.free_slots + len(held) == 6
    assert not running.busy
    assert all(len(some[i].output_ids) == 9 for i in added if not some[i].cancelled)


def test_no_sequence_is_admitted_beyond_the_memory() -> None:
    scheduler = Scheduler(options(Mode.PLAIN, kv_tokens=40))
    for sequence in sequences([[2] * 5] * 3, max_tokens=10):
        scheduler.add(sequence)
    scheduler.next_batch()
    assert [s.slot for s in scheduler.sequences] == [0, 1, -1], "each may come to need 15 of the 40 tokens"
    assert (scheduler.slots.used_pages, scheduler.slots.free_pages) == (10, 30)
    assert scheduler.free_capacity == 0


def test_short_prompts_are_answered_before_a_long_one_ahead_of_them_has_been_read() -> None:
    long, *short = sequences([[2 + i % 50 for i in range(6000)], *[[60 - i, 9, i] for i in range(6)]], max_tokens=5)
    chosen = options(Mode.PLAIN, max_context=6100, max_sequences=8, prefill_rows=100)
    running = engine(TableModel(last_token), None, chosen)
    for sequence in (long, *short):
        running.add(sequence)
    running.step()
    assert all(len(s.output_ids) == 1 for s in short)
    assert long.cached >= 25
    while not all(s.finished for s in short):
        running.step()
    assert long.cached < 600


def test_a_long_prompt_progresses_while_short_ones_arrive() -> None:
    long = sequences([[2 + i % 50 for i in range(400)]], max_tokens=1)[0]
    running = engine(TableModel(last_token), None, options(Mode.PLAIN, max_context=500, prefill_rows=40))
    running.add(long)
    for round_ in range(40):
        for sequence in sequences([[51, round_, i, *range(30)] for i in range(2)], max_tokens=1):
            running.add(sequence)
        running.step()
    assert long.finished


def test_decoding_sequences_emit_in_every_step_while_prompts_are_read() -> None:
    running = engine(TableModel(last_token), None, options(Mode.PLAIN))
    decoding, reading = sequences([[3], [2 + i % 50 for i in range(200)]], max_tokens=12)
    running.add(decoding)
    running.step()
    running.add(reading)
    while not decoding.finished:
        assert decoding.number in running.step().numbers
    assert reading.prefilling


def test_a_recent_cached_prefix_outlives_an_older_one() -> None:
    model = TableModel(last_token)
    running = engine(model, None, options(Mode.PLAIN, max_sequences=2))
    old, young, other = [5] * 30, [6] * 30, [7] * 30
    for prompt in (old, young, other):
        decode(running, sequences([prompt], max_tokens=1))
    read = model.rows
    decode(running, sequences([young], max_tokens=1))
    assert model.rows == read + 1
