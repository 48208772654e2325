"""No end-of-sequence token is drawn before `min_tokens`: on any path of a tree, in any batch, after any restart."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
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
    plain_texts,
    resumed_after,
    sequences,
    shared_target,
)
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.sequence import FinishReason
from worker.engine.sequence import Sequence as EngineSequence

MIN_TOKENS = 6
SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95, min_tokens=MIN_TOKENS)
BIASED = Sampling(temperature=0.9, repetition_penalty=1.3, logit_bias=((3, 4.0), (5, -2.0)), min_tokens=MIN_TOKENS)
GREEDY = Sampling(min_tokens=MIN_TOKENS)


def ends() -> list[int]:
    """Tokens that most texts hold early: all of them end the sequence."""
    return sorted({token for text in plain_texts() for token in text[1:3]})


def some(sampling: Sampling) -> list[EngineSequence]:
    return sequences(max_tokens=12, sampling=sampling, eos_ids=ends())


@cache
def plainly(sampling: Sampling) -> list[EngineSequence]:
    texts = some(sampling)
    decode(engine(shared_target(), None, options(Mode.PLAIN)), texts)
    return texts


def test_greedy_texts_are_those_of_transformers() -> None:
    model: Any = tiny()
    model.generation_config.eos_token_id = ends()
    expected = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=MIN_TOKENS, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert outputs(plainly(GREEDY)) == expected


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, BIASED], ids=["greedy", "sampled", "biased"])
@pytest.mark.parametrize(("kind", "mode"), [("same", Mode.PAPER), ("random", Mode.OPT_TREE), ("suffix", Mode.PAPER)])
def test_the_text_does_not_depend_on_drafts_and_ends_no_earlier(sampling: Sampling, kind: str, mode: Mode) -> None:
    expected = plainly(sampling)
    texts = some(sampling)
    decode(engine(shared_target(), drafter(kind), options(mode, max_sequences=2, nodes=30)), texts[::-1])
    assert outputs(texts) == outputs(expected)
    ended = [text for text in texts if text.finish_reason is FinishReason.STOP]
    assert ended
    assert all(set(ends()).isdisjoint(text.output_ids[:MIN_TOKENS]) for text in texts)


@pytest.mark.parametrize("after", [1, MIN_TOKENS - 1])
def test_a_resumed_text_ends_no_earlier_either(after: int) -> None:
    whole = plainly(SAMPLED)
    resumed = resumed_after(after, outputs(whole), some(SAMPLED))
    decode(engine(shared_target(), drafter("same"), options(Mode.PAPER)), resumed)
    assert outputs(resumed) == outputs(whole)


def test_after_min_tokens_a_token_is_drawn_as_without() -> None:
    whole = plainly(SAMPLED)
    free = resumed_after(MIN_TOKENS, outputs(whole), some(Sampling(temperature=0.9, top_k=20, top_p=0.95)))
    decode(engine(shared_target(), None, options(Mode.PLAIN)), free)
    assert outputs(free) == outputs(whole)


def test_a_bias_of_an_end_token_counts_after_min_tokens_only() -> None:
    sequence = EngineSequence(0, [1, 2], 2, 9, Sampling(logit_bias=((7, 3.0), (8, 1.0)), min_tokens=2), frozenset({7}))
    early, late = sequence.bias(3), sequence.bias(4)
    assert [dict(zip(tokens.tolist(), values.tolist(), strict=True)) for tokens, values in (early, late)] == [
        {7: -np.inf, 8: 1.0},
        {7: 3.0, 8: 1.0},
    ]
