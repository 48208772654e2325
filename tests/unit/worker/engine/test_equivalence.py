"""Drafts never change a text: it is the one that plain decoding writes, and plain decoding equals transformers'."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.models import ARCHITECTURES, tiny
from tests.unit.worker.engine.harness import (
    MAX_TOKENS,
    PROMPTS,
    all_at_once,
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

SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.95)


@cache
def reference(architecture: str = "llama") -> list[list[int]]:
    """Return the MAX_TOKENS tokens that transformers writes after each of PROMPTS."""
    model: Any = tiny(architecture)  # transformers types `generate` for mixins that no model class declares
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in PROMPTS:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_greedy_text_equals_transformers_generate(architecture: str) -> None:
    some = sequences()
    decode(engine(shared_target(architecture), None, all_at_once(Mode.PLAIN)), some)
    assert outputs(some) == reference(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("kind", "nodes"), [("suffix", 4), ("same", 1), ("same", 60)])
def test_greedy_tree_decoding_equals_transformers_generate(architecture: str, nodes: int, kind: str) -> None:
    some = sequences()
    results = decode(engine(shared_target(architecture), drafter(kind), all_at_once(Mode.PAPER, nodes=nodes)), some)
    assert outputs(some) == reference(architecture)
    assert any(r.stats.tree_nodes for r in results), "no tree was verified, so nothing was tested"


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["suffix", "same", "random"])
@pytest.mark.parametrize("mode", [Mode.PAPER, Mode.OPT_TREE])
def test_text_does_not_depend_on_draft_mode_or_batch(sampling: Sampling, kind: str, mode: Mode) -> None:
    some = sequences(sampling=sampling)
    decode(engine(shared_target(), drafter(kind), options(mode, max_sequences=2)), some[::-1])
    assert outputs(some) == plain_texts(sampling=sampling)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", [Mode.PAPER, Mode.OPT_TREE])
def test_sequences_without_drafts_have_the_same_text_beside_others_that_have_drafts(
    sampling: Sampling, mode: Mode
) -> None:
    some = sequences(sampling=sampling)
    for sequence in some[::2]:
        sequence.drafts = False
    results = decode(engine(shared_target(), drafter("same"), all_at_once(mode)), some)
    assert outputs(some) == plain_texts(sampling=sampling)
    plain = {sequence.number for sequence in some[::2]}
    assert not any(result.stats.tree_nodes for result in results if result.number in plain)
    drafted = any(result.stats.tree_nodes for result in results)
    assert drafted or mode is Mode.OPT_TREE, "no tree was verified, so nothing was tested"  # one that measures may not


def test_a_draft_with_the_targets_weights_is_accepted_to_full_depth() -> None:
    some = sequences(max_tokens=16)
    results = decode(engine(shared_target(), drafter("same"), all_at_once(Mode.PAPER, threshold=0, nodes=60)), some)
    accepted = [r.stats.accepted_tokens for r in results if r.stats.step]
    assert sum(accepted) / len(accepted) > 2.0


def test_shared_noise_lifts_acceptance_when_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepted() -> float:
        some = sequences(max_tokens=16, sampling=Sampling(temperature=1.0))
        results = decode(engine(shared_target(), drafter("random"), all_at_once(Mode.PAPER, threshold=0)), some)
        return sum(r.stats.accepted_tokens for r in results) / len(results)

    shared = accepted()
    monkeypatch.setattr("worker.drafters.candidates.gumbel_scores", lambda scores, *_: scores)
    assert shared > 1.5 * accepted()


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("after", [1, MAX_TOKENS - 1])
def test_a_resumed_sequence_continues_as_if_it_had_not_stopped(sampling: Sampling, after: int) -> None:
    whole = plain_texts(sampling=sampling)
    resumed = resumed_after(after, whole, sequences(sampling=sampling))
    decode(engine(shared_target(), drafter("suffix"), options(Mode.PAPER)), resumed)
    assert outputs(resumed) == whole


@pytest.mark.parametrize("mode", Mode)
def test_a_text_ends_exactly_at_its_end_of_sequence_token_inside_an_accepted_path(mode: Mode) -> None:
    eos = reference()[0][2]
    expected = [text[: [*text, eos].index(eos) + 1] for text in reference()]
    some = sequences(eos_ids=[eos])
    results = decode(engine(shared_target(), drafter("same"), all_at_once(mode, nodes=60)), some)
    assert outputs(some) == expected
    assert some[0].finish_reason is FinishReason.STOP
    if mode is Mode.PAPER:
        last = [r.stats for r in results if r.finish_reason is FinishReason.STOP]
        assert any(n.emitted_tokens == n.accepted_tokens > 1 for n in last), "no accepted draft ended a text"


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_max_tokens_cuts_inside_an_accepted_path(max_tokens: int) -> None:
    some = sequences(max_tokens=max_tokens)
    results = decode(engine(shared_target(), drafter("same"), all_at_once(Mode.PAPER, nodes=60)), some)
    assert outputs(some) == [text[:max_tokens] for text in reference()]
    assert {s.finish_reason for s in some} == {FinishReason.LENGTH}
    assert sum(r.stats.emitted_tokens for r in results) == max_tokens * len(some)


def test_step_numbers_add_up_to_the_tokens_of_each_sequence() -> None:
    some = sequences()
    results = decode(engine(shared_target(), drafter("random"), options(Mode.PAPER)), some)
    for sequence in some:
        own = [r.stats for r in results if r.number == sequence.number]
        assert [n.step for n in own] == list(range(len(own)))
        assert own[0].tree_nodes == 0
        assert sum(n.emitted_tokens for n in own) == len(sequence.output_ids)
        assert all(n.accepted_tokens <= n.tree_depth <= n.tree_nodes for n in own)
        assert all(n.emitted_tokens in (n.accepted_tokens, n.accepted_tokens + 1) for n in own)
