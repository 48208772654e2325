"""Laws of generated training texts: deterministic by seed, and resumed after an interruption without loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.errors import InvalidValue
from tests.models import byte_tokenizer, packed, tiny
from worker.engine.engine import Engine
from worker.engine.options import EngineOptions, Mode
from worker.engine.speculation.cost_model import CostModel
from worker.loading.loader import LoadedModel
from worker.text.codec import Codec
from worker.training import self_generated as self_generated
from worker.training.config import Recipe
from worker.training.self_generated import Text, read, write

RECIPE = Recipe(tokens=100, answer_tokens=12)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A tiny target that chats in bytes."""
    monkeypatch.setattr(self_generated, "_ROUND", 16)
    monkeypatch.setattr(self_generated, "_QUESTION_TOKENS", 40)
    model = tiny("llama", vocab=258)
    target = packed(model, slots=16)
    options = EngineOptions(Mode.PLAIN, max_sequences=16, max_context=256)
    ends = frozenset(range(6, 258, 25))  # a random model rarely writes <eos>
    made = SimpleNamespace(
        name="tiny",
        codec=Codec(byte_tokenizer(), ends, 256, 258),
        options=options,
        engine=lambda chosen: Engine(target, None, chosen, CostModel({1: 1.0})),
    )
    return cast(LoadedModel, made)


def test_the_target_writes_questions_in_its_chat_template(loaded: LoadedModel, tmp_path: Path) -> None:
    texts = write(loaded, RECIPE, tmp_path / "texts.jsonl")
    assert sum(text.written for text in texts) >= RECIPE.tokens
    for text in texts:
        prompt = bytes(i for i in text.ids[: text.num_prompt] if i < 256).decode(errors="replace")
        assert prompt.startswith("user: ")
        assert prompt.endswith("assistant: ")
        assert 0 < text.written <= RECIPE.answer_tokens


def test_the_same_seed_writes_the_same_texts_even_after_an_interruption(loaded: LoadedModel, tmp_path: Path) -> None:
    whole = write(loaded, RECIPE, tmp_path / "whole.jsonl")
    part = tmp_path / "part.jsonl"
    write(loaded, replace(RECIPE, tokens=1), part)
    with part.open("a") as out:
        out.write('{"ids": [1, 2')  # as after a power failure
    assert write(loaded, RECIPE, part) == whole == read(part)
    assert write(loaded, replace(RECIPE, seed=1), tmp_path / "other.jsonl") != whole


def test_given_prompts_replace_questions(loaded: LoadedModel, tmp_path: Path) -> None:
    texts = write(loaded, RECIPE, tmp_path / "texts.jsonl", prompts=["abc", "xyz"])
    prompts = [bytes(i for i in text.ids[: text.num_prompt] if i < 256) for text in texts]
    assert prompts[:3] == [b"user: abc\nassistant: ", b"user: xyz\nassistant: ", b"user: abc\nassistant: "]


def test_greedy_and_sampled_answers_are_interleaved(loaded: LoadedModel, tmp_path: Path) -> None:
    texts = write(loaded, replace(RECIPE, greedy_share=0.5), tmp_path / "texts.jsonl", prompts=["abc"])
    shares = [sum(text.greedy for text in texts[start : start + 10]) for start in range(0, len(texts) - 9, 10)]
    assert shares
    assert set(shares) == {5}


def test_reported_tokens_add_up_to_the_answers(loaded: LoadedModel, tmp_path: Path) -> None:
    counts: list[int] = []
    file = tmp_path / "texts.jsonl"
    texts: list[Text] = write(loaded, RECIPE, file, prompts=["abc"], on_tokens=cast(Any, counts.append))
    assert sum(counts) == sum(text.written for text in texts)


def test_prompts_too_long_for_an_answer_are_skipped_and_an_error_if_all_are(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    long = "x" * 228
    texts = write(loaded, RECIPE, tmp_path / "texts.jsonl", prompts=[long, "abc"])
    assert {bytes(text.ids[text.num_prompt - 16 : text.num_prompt - 13]) for text in texts} == {b"abc"}
    with pytest.raises(InvalidValue, match=r"no prompt leaves 12 tokens .* of 256: the shortest has 2\d\d tokens"):
        write(loaded, RECIPE, tmp_path / "none.jsonl", prompts=[long])


def test_a_target_that_writes_no_question_is_an_error(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_generated, "_QUESTION_TOKENS", 1)
    with pytest.raises(InvalidValue, match="wrote no question"):
        write(loaded, RECIPE, tmp_path / "texts.jsonl")
