"""Log-probabilities of prompts: those of one forward, in any chunk, batch and memory, after any restart.

The same bits in bfloat16, in which the compiled kernels sum each row alone. In float32 forwards of less than four rows
round differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.models import ARCHITECTURES, TableModel, packed, tiny
from tests.unit.worker.engine.harness import (
    decode,
    drafter,
    engine,
    options,
    outputs,
    resumed_after,
    sequences,
    shared_target,
)
from tests.unit.worker.engine.test_logprobs import ROUNDING
from tests.unit.worker.engine.test_sharing import last_token
from worker.engine import scheduler
from worker.engine.options import MAX_STEP_NODES, Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.sequence import FinishReason
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stats import StepResult
from worker.engine.token_logprobs import TokenLogprobs

SYSTEM = [2 + i % 37 for i in range(30)]
PROMPTS = [[*SYSTEM, 7, 8], [5], [*SYSTEM, 9, 40, 41], [20, 21], [*SYSTEM, 7, 8]]
TOP = 3


def asking(top: int | None = TOP, max_tokens: int = 4, **changes: Any) -> list[EngineSequence]:
    some = sequences(PROMPTS, max_tokens, **changes)
    for sequence in some:
        sequence.prompt_top = top
    return some


def told(results: Sequence[StepResult], some: Sequence[EngineSequence]) -> list[list[TokenLogprobs]]:
    """Return the log-probabilities of each prompt; they come once, with the first token."""
    found = []
    for sequence in some:
        (own,) = [r for r in results if r.number == sequence.number and r.prompt_logprobs is not None]
        found.append(list(own.prompt_logprobs or ()))
    return found


@cache
def target() -> Any:
    model: Any = tiny()
    return packed(model.to(torch.bfloat16))


def run(some: list[EngineSequence], kind: str | None = None, **changes: Any) -> list[list[TokenLogprobs]]:
    chosen = options(Mode.PLAIN if kind is None else Mode.PAPER, **changes)
    return told(decode(engine(target(), None if kind is None else drafter(kind), chosen), some), some)


@cache
def plainly() -> list[list[TokenLogprobs]]:
    """Return the log-probabilities of plain decoding."""
    return run(asking())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_are_the_log_softmax_of_one_forward_of_transformers(architecture: str) -> None:
    some = asking()
    found = told(decode(engine(shared_target(architecture), None, options(Mode.PLAIN)), some), some)
    model: Any = tiny(architecture)
    for prompt, entries in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            law = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert len(entries) == len(prompt) - 1
        for row, token, entry in zip(law, prompt[1:], entries, strict=False):
            assert entry.logprob == pytest.approx(float(row[token]), abs=ROUNDING)
            assert [p for _, p in entry.top] == pytest.approx(row.topk(TOP).values.tolist(), abs=ROUNDING)
            assert all(p == pytest.approx(float(row[other]), abs=ROUNDING) for other, p in entry.top)
            ranks = [int((row > row[token] + shift).sum()) + 1 for shift in (ROUNDING, -ROUNDING)]
            assert ranks[0] <= entry.rank <= ranks[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill_rows": 500},
        {"prefill_rows": 3},
        {"max_sequences": 1},
        {"kind": "same"},
        {"kind": "suffix", "max_sequences": 2},
        {"kv_tokens": 120},
    ],
)
def test_they_are_the_same_bits_in_any_chunk_batch_and_memory(changes: dict[str, Any]) -> None:
    assert run(asking(), **changes) == plainly()


def test_a_limit_of_rows_cuts_chunks_and_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_STEP_NODES", 5)
    some = asking()
    running = engine(target(), drafter("same"), options(Mode.PAPER, prefill_rows=500, nodes=4))
    kept: list[int] = []
    forward = running._target.forward

    def counted(segments: Any) -> Any:
        logits = forward(segments)
        kept.append(len(logits))
        return logits

    monkeypatch.setattr(running._target, "forward", counted)
    assert told(decode(running, some), some) == plainly()
    assert max(kept) <= 5 + 4, "five scored rows or draft nodes, and one for each of four sequences"


def test_a_prompt_of_any_length_keeps_a_bounded_number_of_rows() -> None:
    model = TableModel(last_token)
    (some,) = sequences([[2 + i % 37 for i in range(700)]], max_tokens=1)
    some.prompt_top = 0
    running = engine(model, None, options(Mode.PLAIN, prefill_rows=4096, max_context=1024))
    ((result,),) = [[r for r in decode(running, [some]) if r.prompt_logprobs is not None]]
    assert len(result.prompt_logprobs or ()) == 699
    assert model.forwards == -(-699 // MAX_STEP_NODES)
    assert model.rows == 700


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_sequence_has_them_again(after: int) -> None:
    whole = asking()
    expected = run(whole)
    resumed = list(resumed_after(after, outputs(whole), asking()))
    assert run(resumed, "same") == expected
    assert outputs(resumed) == outputs(whole)


def test_a_shared_prefix_does_not_leave_rows_out() -> None:
    running = engine(target(), None, options(Mode.PLAIN))
    plain = asking(None, max_tokens=8)
    first = decode(running, plain)  # leaves its prefixes in the slots
    assert all(result.prompt_logprobs is None for result in first)
    for _ in range(2):
        some = asking(max_tokens=8)
        assert told(decode(running, some), some) == plainly()
        assert outputs(some) == outputs(plain)


def test_others_share_the_prefix_of_a_prompt_that_is_scored() -> None:
    model = TableModel(last_token)
    some = sequences([PROMPTS[0]] * 4, max_tokens=1)
    some[0].prompt_top = 0
    decode(engine(model, None, options(Mode.PLAIN)), some)
    assert model.rows == len(PROMPTS[0]) + 3


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, logprobs=2)])
def test_no_text_changes_where_they_are_asked_for(sampling: Sampling) -> None:
    plain, scored = asking(None, sampling=sampling), asking(sampling=sampling)
    decode(engine(shared_target(), None, options(Mode.PLAIN)), plain)
    decode(engine(shared_target(), drafter("same"), options(Mode.PAPER)), scored)
    assert outputs(scored) == outputs(plain)


@pytest.mark.parametrize("kind", ["same", None])
def test_a_sequence_of_no_tokens_ends_when_its_prompt_is_read_beside_others(kind: str | None) -> None:
    some = asking()
    for empty in some[::2]:
        empty.max_tokens = 0
    mode, drafts = (Mode.PAPER, drafter(kind)) if kind else (Mode.PLAIN, None)
    results = decode(engine(target(), drafts, options(mode)), some)
    assert told(results, some) == plainly()
    for empty in some[::2]:
        assert (empty.output_ids, empty.finish_reason) == ([], FinishReason.LENGTH)
        (last,) = [r for r in results if r.number == empty.number]
        assert (last.tokens, last.finish_reason) == ((), FinishReason.LENGTH)
    whole = asking()
    run(whole)
    assert outputs(some)[1::2] == outputs(whole)[1::2]


def test_only_as_many_alternatives_as_asked_for() -> None:
    (some,) = asking()[:1]
    (more,) = [replace(one, prompt_top=20) for one in asking()[:1]]
    three, twenty = run([some])[0], run([more])[0]
    assert [entry.top for entry in three] == [entry.top[:TOP] for entry in twenty]
    assert {len(entry.top) for entry in twenty} == {20}
