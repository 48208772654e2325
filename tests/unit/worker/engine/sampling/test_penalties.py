"""Laws of penalties and bias: exact at every node of a tree, and independent of drafts and batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from tests.goodness_of_fit import chi_square_p
from tests.models import tiny
from tests.unit.worker.engine.harness import (
    MAX_TOKENS,
    PROMPTS,
    decode,
    drafter,
    engine,
    finish,
    greedy_and_sampled,
    noise_key,
    options,
    outputs,
    plain_texts,
    resumed_after,
    sequences,
    shared_target,
)
from tests.unit.worker.engine.sampling.test_sampling import (
    EveryToken,
    by_transformers,
    two_step_engine,
    two_step_logits,
)
from worker.engine.options import Mode
from worker.engine.sampling.parameters import Sampling
from worker.engine.sequence import Sequence
from worker.engine.speculation import verifier
from worker.engine.speculation.draft_tree import Candidates, Forest

ADJUSTED = {
    "presence": Sampling(presence_penalty=1.5),
    "frequency": Sampling(frequency_penalty=0.7),
    "rewarded": Sampling(presence_penalty=-0.5, frequency_penalty=-0.25),
    "repetition": Sampling(repetition_penalty=1.4),
    "bias": Sampling(logit_bias=((1, 1.5), (2, -100.0))),
    "all": Sampling(
        presence_penalty=0.3, frequency_penalty=0.4, repetition_penalty=1.3, logit_bias=((0, 0.5), (3, -0.5))
    ),
}
each_adjustment = pytest.mark.parametrize("sampling", ADJUSTED.values(), ids=ADJUSTED)
each_temperature = pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])


def step_by_step(logits: Tensor, text: list[int], num_prompt: int, sampling: Sampling) -> Tensor:
    """Return one row of logits after transformers' own processors and OpenAI's formula, for a given text."""
    ids, scores = torch.tensor([text]), logits.float().unsqueeze(0)
    if sampling.logit_bias:
        biases: Any = {(token,): bias for token, bias in sampling.logit_bias}  # its annotation lacks this form
        scores = SequenceBiasLogitsProcessor(biases)(ids, scores)
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(text[num_prompt:], dtype=torch.int64), minlength=len(logits))
    adjusted: Tensor = scores[0] - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty
    return adjusted


@each_adjustment
def test_every_node_is_adjusted_by_its_own_path_as_transformers_would_step_by_step(sampling: Sampling) -> None:
    sequence = Sequence(0, [2, 5, 2, 7, 3, 3], 4, 50, sampling)
    other = Sequence(1, [6, 6], 1, 50, Sampling())
    forest = Forest([sequence, other])
    frontier = forest.roots
    for tokens in ([3, 9], [2, 3], [11, 9]):
        count = len(frontier)
        frontier = forest.add_layer(
            frontier, Candidates(np.tile(np.array(tokens), (count, 1)), np.full((count, 2), 0.5))
        )
    logits = torch.randn(forest.size, 13, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    adjusted = forest.adjusted(logits, np.arange(forest.size))
    for node in range(forest.size):
        owner = forest.sequences[forest.tree[node]]
        text = owner.ids + forest.path(node)
        expected = step_by_step(logits[node], text, owner.num_prompt, owner.sampling)
        assert torch.allclose(adjusted[node], expected, atol=1e-6)
    assert torch.equal(logits, before)


def test_plain_greedy_text_equals_transformers_generate_under_its_processors() -> None:
    model: Any = tiny()
    bias = ((4, 2.0), (9, -3.0))
    some = sequences(sampling=Sampling(repetition_penalty=1.3, logit_bias=bias))
    decode(engine(shared_target(), None, options(Mode.PLAIN)), some)
    model.generation_config.eos_token_id = None
    for sequence, prompt in zip(some, PROMPTS, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=1.3,
            sequence_bias={(token,): value for token, value in bias},
        )
        assert sequence.output_ids == out[0, len(prompt) :].tolist()


@each_adjustment
@pytest.mark.parametrize("kind", ["suffix", "same"])
def test_adjusted_text_does_not_depend_on_draft_or_batch(sampling: Sampling, kind: str) -> None:
    chosen = replace(sampling, temperature=0.9)
    some = greedy_and_sampled(chosen)
    results = decode(engine(shared_target(), drafter(kind), options(Mode.PAPER, max_sequences=5)), some[::-1])
    assert outputs(some) == plain_texts(sampling=chosen, both=True)
    if kind == "same":
        assert sum(r.stats.accepted_tokens for r in results) > len(results), "drafts were not ranked as the target is"


def test_neighbours_in_a_batch_keep_their_own_adjustments() -> None:
    mixed = [Sampling(), ADJUSTED["all"], Sampling(0.9), replace(ADJUSTED["all"], temperature=0.9), Sampling()]

    def texts(max_sequences: int) -> list[list[int]]:
        some = sequences()
        for i, sequence in enumerate(some):
            sequence.sampling = replace(mixed[i], key=noise_key(7, i))
        decode(engine(shared_target(), drafter("same"), options(Mode.PAPER, max_sequences=max_sequences)), some)
        return outputs(some)

    assert texts(4) == texts(1)


@each_temperature
def test_an_adjusted_sequence_resumes_from_its_tokens_with_the_same_text(temperature: float) -> None:
    chosen = replace(ADJUSTED["all"], temperature=temperature)
    whole = plain_texts(sampling=chosen)
    for after in (1, MAX_TOKENS - 1):
        resumed = resumed_after(after, whole, sequences(sampling=chosen))
        decode(engine(shared_target(), drafter("suffix"), options(Mode.PAPER)), resumed)
        assert outputs(resumed) == whole, after


@each_adjustment
@pytest.mark.parametrize(
    ("filters", "drafted"),
    [(Sampling(1.0), False), (Sampling(1.3, top_k=3, min_p=0.05), True)],
    ids=["softmax, plain", "filtered, full trees"],
)
def test_two_tokens_follow_the_adjusted_joint_law(sampling: Sampling, filters: Sampling, drafted: bool) -> None:
    chosen = replace(
        sampling, temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p, min_p=filters.min_p
    )
    prompt, count = [2, 0], 500

    def law(text: list[int]) -> Tensor:
        adjusted = step_by_step(two_step_logits(tuple(text)), text, len(prompt), chosen)
        return by_transformers(chosen, adjusted.unsqueeze(0))[0]

    running = two_step_engine(EveryToken() if drafted else None)
    some = [Sequence(i, list(prompt), 2, 3, replace(chosen, key=noise_key(i, 0))) for i in range(count)]
    finish(running, some)
    counts = np.zeros((4, 4))
    for sequence in some:
        first, second, _ = sequence.output_ids
        counts[first, second] += 1
    first_law = law(prompt)
    joint = torch.stack([first_law[i] * law([*prompt, i]) for i in range(4)]).double().numpy()
    possible = joint * count > 1e-9
    assert counts[~possible].sum() == 0
    expected = joint[possible] / joint[possible].sum() * count
    assert chi_square_p(counts[possible], expected) > 1e-3


def test_rows_that_are_drawn_at_once_give_the_text_of_lazy_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which draws the rows of all nodes in one call."""
    mixed = [Sampling(), ADJUSTED["all"], Sampling(0.9), replace(ADJUSTED["all"], temperature=0.9), Sampling(0.9)]

    def texts() -> list[list[int]]:
        some = sequences()
        for i, sequence in enumerate(some):
            sequence.sampling = replace(mixed[i], key=noise_key(7, i))
        decode(engine(shared_target(), drafter("same"), options(Mode.PAPER)), some)
        return outputs(some)

    lazy = texts()
    monkeypatch.setattr(verifier, "_draws_at_once", lambda _: True)
    assert texts() == lazy


def test_greedy_sequences_without_adjustments_take_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_draw(*_: object) -> Tensor:
        raise AssertionError("a plain greedy tree was drawn row by row")

    monkeypatch.setattr(verifier, "draw", no_draw)
    decode(engine(shared_target(), drafter("same"), options(Mode.PAPER)), sequences())
