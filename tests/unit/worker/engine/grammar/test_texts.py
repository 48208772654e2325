"""Texts under a grammar are those of plain masked decoding, with any drafts, trees, batch, memory and restarts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence as Seq
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from tests.models import json_tokenizer, tiny
from tests.unit.worker.engine.grammar.grammars import (
    CODES,
    EOS,
    LOOSE,
    OBJECT,
    SAMPLINGS,
    WIDTH,
    bound_by,
    constrained_engine,
    vocabulary,
)
from tests.unit.worker.engine.harness import decode, outputs, resumed_after
from worker.engine.grammar.grammar import Grammar
from worker.engine.options import Mode
from worker.engine.output_lengths import OutputLengths
from worker.engine.sampling.penalties import adjustments_of
from worker.engine.sampling.sampling import draw
from worker.engine.sequence import FinishReason, Sequence
from worker.engine.speculation import verifier

MIXED = (OBJECT, None, LOOSE, CODES, None, OBJECT, OBJECT)


def text_of(ids: list[int]) -> str:
    """Return the text of output tokens without the end."""
    return str(json_tokenizer().decode([token for token in ids if token != EOS]))


@cache
def plain() -> list[list[int]]:
    """Return what plain decoding emits for MIXED."""
    some = bound_by(MIXED)
    decode(constrained_engine(Mode.PLAIN), some)
    return outputs(some)


def fresh_mask(grammar: Grammar, output: list[int]) -> torch.Tensor:
    """Return the mask of a matcher that has read nothing but these tokens."""
    matcher = LLMatcher(vocabulary().tokenizer, grammar.text)
    assert matcher.consume_tokens(output)
    row = np.zeros((1, -(-WIDTH // 32)), np.int32)
    matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    assert not matcher.is_error()
    return torch.from_numpy(row)


@torch.inference_mode()
def reference(sequence: Sequence) -> list[int]:
    """Decode with transformers, a fresh matcher for every token, and no cache."""
    model = tiny(vocab=WIDTH)
    assert sequence.grammar is not None
    while sequence.remaining and EOS not in sequence.output_ids:
        logits = model(torch.tensor([sequence.ids])).logits[0, -1:].float()
        bias, seen = sequence.bias(len(sequence.ids)), sequence.seen(())
        adjustments = adjustments_of([bias], [seen]) if sequence.sampling.adjusted else None
        position = np.array([len(sequence.ids)])
        mask = fresh_mask(sequence.grammar, sequence.output_ids)
        sequence.ids += draw(logits, sequence.sampling.record, position, None, adjustments, mask).tolist()
    return sequence.output_ids


def test_plain_texts_are_drawn_from_the_masked_target() -> None:
    some = bound_by(MIXED)
    for index in (0, 3, 5):  # greedy, with penalty and bias, and sampled
        assert reference(some[index]) == plain()[index]


def test_a_finished_answer_matches_its_grammar_and_ends_by_stop() -> None:
    some = bound_by([OBJECT] * 4)
    decode(constrained_engine(Mode.OPT_TREE), some)
    for sequence in some:
        assert sequence.finish_reason is FinishReason.STOP
        answer = json.loads(text_of(sequence.output_ids))
        assert list(answer) == ["name", "kind", "ok"]
        assert len(answer["name"]) <= 3
        assert answer["kind"] in ("alpha", "beta gamma")
        assert isinstance(answer["ok"], bool)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(Mode.PAPER, "same"), (Mode.OPT_TREE, "suffix"), (Mode.OPT_TREE, "random")],
)
def test_texts_do_not_depend_on_draft_mode_or_batch(mode: Mode, kind: str) -> None:
    some = bound_by(MIXED)
    results = decode(constrained_engine(mode, kind, max_sequences=3), some[::-1])
    assert outputs(some) == plain()
    if mode is Mode.PAPER:  # the other one drafts where time says that it pays
        sources = {r.stats.drafter for r in results}
        assert {"grammar", kind, f"{kind}+grammar"} <= sources, "the network did not draft below forced tokens"


@pytest.mark.parametrize("nodes", [1, 60])
def test_texts_do_not_depend_on_the_size_of_trees(nodes: int) -> None:
    some = bound_by(MIXED)
    decode(constrained_engine(Mode.PAPER, nodes=nodes, threshold=-1.0), some)
    assert outputs(some) == plain()


def test_sequences_without_a_grammar_are_the_same_beside_those_with_one() -> None:
    free = [index for index, grammar in enumerate(MIXED) if grammar is None]
    alone = bound_by(MIXED)
    decode(constrained_engine(Mode.OPT_TREE), [alone[index] for index in free])
    assert [alone[index].output_ids for index in free] == [plain()[index] for index in free]


def test_a_sequence_that_is_resumed_continues_with_its_grammar() -> None:
    resumed = bound_by(MIXED)
    for index, (sequence, ids) in enumerate(zip(resumed, plain(), strict=True)):
        sequence.steps = 1 + index
        sequence.ids += ids[: sequence.steps]
    decode(constrained_engine(Mode.PAPER), resumed)
    assert outputs(resumed) == plain()


@pytest.mark.parametrize("kind", ["suffix", "random"])
def test_texts_are_the_same_under_preemption(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputLengths, "expected", lambda _, group, decoded: np.array(decoded, np.int64) + 1)
    some = bound_by(MIXED)
    running = constrained_engine(Mode.OPT_TREE, kind, kv_tokens=80)
    decode(running, some)
    assert outputs(some) == plain()
    assert running.preemptions, "memory was not short"


def test_texts_do_not_depend_on_which_sequences_share_a_step() -> None:
    some = bound_by(MIXED)
    running = constrained_engine(Mode.OPT_TREE)
    for sequence in some:
        running.add(sequence)
    rng = random.Random(3)
    while running.busy:
        running.step(only=rng.sample(range(len(some)), 3), plain=rng.random() < 0.3)
    assert outputs(some) == plain()


@pytest.mark.parametrize("max_tokens", [1, 6])
def test_max_tokens_cuts_an_answer_inside_forced_tokens(max_tokens: int) -> None:
    some = bound_by(MIXED, max_tokens)
    results = decode(constrained_engine(Mode.PAPER), some)
    assert outputs(some) == [ids[:max_tokens] for ids in plain()]
    assert sum(r.stats.emitted_tokens for r in results) == sum(map(len, outputs(some)))
    cut = [s for s in some if EOS not in s.output_ids]
    assert {s.finish_reason for s in cut} == {FinishReason.LENGTH}


def test_a_grammar_begins_after_its_tokens_wherever_a_path_completes_them() -> None:
    def bound(grammars: Seq[Grammar | None]) -> list[Sequence]:
        return bound_by(grammars, 60, SAMPLINGS[1:3])

    free = bound([None] * 3)
    decode(constrained_engine(Mode.PLAIN), free)
    starts = zip(free, (0, 3, 9), strict=True)  # each text has its own tokens there
    grammars = [Grammar(OBJECT.text, tuple(one.output_ids[start : start + 2])) for one, start in starts]
    expected = bound(grammars)
    decode(constrained_engine(Mode.PLAIN), expected)
    for sequence, other in zip(expected, free, strict=True):
        assert sequence.grammar is not None
        ids, after = sequence.output_ids, list(sequence.grammar.after)
        end = next(i for i in range(2, len(ids) + 1) if ids[i - 2 : i] == after)
        assert ids[:end] == other.output_ids[:end], "the grammar must not change what precedes it"
        assert sequence.finish_reason is FinishReason.STOP
        json.loads(text_of(ids[end:]))
    some = bound(grammars)
    decode(constrained_engine(Mode.PAPER, "same", threshold=-1.0), some)
    assert outputs(some) == outputs(expected)
    resumed = resumed_after(4, outputs(expected), bound(grammars))
    decode(constrained_engine(Mode.OPT_TREE), resumed)
    assert outputs(resumed) == outputs(expected)


def test_a_request_that_ignores_the_end_of_sequence_ends_with_its_grammar() -> None:
    some = bound_by([OBJECT, CODES])
    for sequence in some:
        sequence.eos_ids = frozenset()
    decode(constrained_engine(Mode.OPT_TREE), some)
    assert {s.finish_reason for s in some} == {FinishReason.STOP}


def test_stop_tokens_end_a_text_only_where_it_is_complete() -> None:
    digit = json_tokenizer().get_vocab()["7"]
    letters = Grammar(LLMatcher.grammar_from_regex("[7-8]{2,4}"))
    for mode in (Mode.PLAIN, Mode.PAPER):
        some = bound_by([letters] * 4, samplings=SAMPLINGS[1:2])
        for sequence in some:
            sequence.eos_ids |= {digit}
        decode(constrained_engine(mode, "same"), some)
        for sequence in some:
            text = text_of(sequence.output_ids)
            assert 2 <= len(text) <= 4, "7 ends a text of one digit, which is not complete"
            assert "7" not in text[:-1]
            assert sequence.finish_reason is FinishReason.STOP


def test_on_a_gpu_the_masks_of_a_step_are_passed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[int] = []

    def counted(logits: Any, parameters: Any, positions: Any, rows: Any, adjustments: Any, mask: Any) -> Any:
        masked[-1] += mask is not None
        return draw(logits, parameters, positions, rows, adjustments, mask)

    monkeypatch.setattr(verifier, "_draws_at_once", lambda _: True)
    monkeypatch.setattr(verifier, "draw", counted)
    some = bound_by(MIXED)
    running = constrained_engine(Mode.OPT_TREE)
    for sequence in some:
        running.add(sequence)
    while running.busy:
        masked.append(0)
        running.step()
    assert max(masked) == 1
    assert outputs(some) == plain()
