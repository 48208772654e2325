"""Logprobs are the target's own, independent of drafts, batch, sampling and interruption.

The same to the rounding of a forward, which sums in another order when it has more rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from tests.models import tiny
from tests.unit.worker.engine.harness import (
    PROMPTS,
    decode,
    drafter,
    engine,
    options,
    outputs,
    resumed_after,
    sequences,
    shared_target,
)
from worker.engine.logprobs import MIN_LOGPROB, read_rows
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.sequence import Sequence as EngineSequence
from worker.engine.stats import StepResult
from worker.engine.token_logprobs import TokenLogprobs

ROUNDING = 1e-4
GREEDY = Sampling(logprobs=5)
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95, frequency_penalty=1.5, logit_bias=((3, 4.0),), logprobs=5)


def told(results: Sequence[StepResult], some: Sequence[EngineSequence]) -> list[list[TokenLogprobs]]:
    """Return the logprobs of each sequence, one entry per token."""
    found = []
    for sequence in some:
        own = [r for r in results if r.number == sequence.number]
        assert all(r.logprobs is not None and len(r.logprobs) == len(r.tokens) for r in own)
        found.append([entry for r in own for entry in r.logprobs or ()])
    return found


def alike(some: Sequence[Sequence[TokenLogprobs]], others: Sequence[Sequence[TokenLogprobs]]) -> bool:
    """Return whether both have the same logprobs per token; equal alternatives may swap."""
    for entries, expected in zip(some, others, strict=True):
        for entry, other in zip(entries, expected, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=ROUNDING)
            assert [p for _, p in entry.top] == pytest.approx([p for _, p in other.top], abs=ROUNDING)
            law = dict(other.top)
            assert all(law.get(token, other.top[-1][1]) == pytest.approx(p, abs=ROUNDING) for token, p in entry.top)
    return True


@cache
def plainly(sampling: Sampling) -> tuple[list[EngineSequence], list[list[TokenLogprobs]]]:
    some = sequences(sampling=sampling)
    return some, told(decode(engine(shared_target(), None, options(Mode.PLAIN)), some), some)


@pytest.mark.parametrize(("architecture", "sampling"), [("llama", GREEDY), ("llama", SAMPLED), ("gemma3", SAMPLED)])
def test_logprobs_are_the_log_softmax_of_the_models_own_logits(architecture: str, sampling: Sampling) -> None:
    some = sequences(sampling=sampling)
    found = told(decode(engine(shared_target(architecture), drafter("suffix"), options(Mode.PAPER)), some), some)
    model: Any = tiny(architecture)
    for sequence, entries in zip(some, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids])).logits[0, sequence.num_prompt - 1 : -1]
        law = logits.log_softmax(-1)
        tokens = torch.tensor(sequence.output_ids).unsqueeze(-1)
        best = law.topk(5, dim=-1)
        expected = [
            TokenLogprobs(p, tuple(zip(*top, strict=True)))
            for p, *top in zip(
                law.gather(-1, tokens).squeeze(-1).tolist(), best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]
        assert alike([entries], [expected])


@pytest.mark.parametrize(
    ("sampling", "kind", "mode"),
    [(GREEDY, "same", Mode.PAPER), (SAMPLED, "suffix", Mode.PAPER), (SAMPLED, "random", Mode.OPT_TREE)],
)
def test_logprobs_do_not_depend_on_draft_mode_or_batch(sampling: Sampling, kind: str, mode: Mode) -> None:
    _, alone = plainly(sampling)
    some = sequences(sampling=sampling)
    results = decode(engine(shared_target(), drafter(kind), options(mode, max_sequences=2)), some[::-1])
    assert alike(told(results, some), alone)


@pytest.mark.parametrize("after", [1, 6])
def test_a_resumed_sequence_gets_the_same_logprobs(after: int) -> None:
    whole, expected = plainly(SAMPLED)
    resumed = resumed_after(after, outputs(whole), sequences(sampling=SAMPLED))
    results = decode(engine(shared_target(), drafter("suffix"), options(Mode.PAPER)), resumed)
    assert alike(told(results, resumed), [entries[after:] for entries in expected])


def test_a_greedy_token_is_its_own_likeliest_alternative_and_probabilities_sum_to_at_most_one() -> None:
    some, found = plainly(GREEDY)
    for sequence, entries in zip(some, found, strict=True):
        chosen = zip(sequence.output_ids, (e.logprob for e in entries), strict=True)
        assert [e.top[0] for e in entries] == list(chosen)
        for entry in entries:
            assert len(entry.top) == 5
            assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)
            assert sum(math.exp(p) for _, p in entry.top) <= 1.0 + 1e-6


def test_tokens_after_the_end_have_no_logprobs() -> None:
    some = sequences(max_tokens=3, sampling=GREEDY)
    found = told(decode(engine(shared_target(), drafter("same"), options(Mode.PAPER, nodes=60)), some), some)
    assert [len(entries) for entries in found] == [3] * len(PROMPTS)


def test_only_sequences_that_request_logprobs_get_them_and_as_many_as_requested() -> None:
    some = sequences()
    for sequence, wanted in zip(some, [None, 0, 3, None, 20], strict=True):
        sequence.sampling = Sampling(logprobs=wanted)
    results = decode(engine(shared_target(), drafter("same"), options(Mode.PAPER)), some)
    for sequence in some:
        own = [r.logprobs for r in results if r.number == sequence.number]
        if sequence.sampling.logprobs is None:
            assert own == [None] * len(own)
        else:
            assert {len(entry.top) for entries in own for entry in entries or ()} == {sequence.sampling.logprobs}


def test_equal_alternatives_come_in_the_order_of_their_tokens() -> None:
    logits = torch.zeros(2, 50)
    logits[:, 7] = 1.0
    for entry in read_rows(logits, [7, 0], [4, 2]):
        assert [token for token, _ in entry.top] == [7, 0, 1, 2][: len(entry.top)]


def test_an_impossible_token_has_a_logprob_that_json_can_encode() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = -torch.inf
    (entry,) = read_rows(logits, [2], [4])
    assert entry.logprob == MIN_LOGPROB
    assert [token for token, _ in entry.top] == [0, 1, 3, 2]
    assert [logprob for _, logprob in entry.top] == pytest.approx([-math.log(3)] * 3 + [MIN_LOGPROB])


def test_no_more_alternatives_than_the_vocabulary_has() -> None:
    (entry,) = read_rows(torch.zeros(1, 3), [1], [20])
    assert [token for token, _ in entry.top] == [0, 1, 2]
