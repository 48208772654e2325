"""Stored log-probabilities in the shapes of OpenAI's two endpoints, read by OpenAI's own client library."""

from __future__ import annotations

import json

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT
from jobs.openai.logprobs import ScoredToken, Stored, TokenAlternatives, logprobs_object


def plain(token: str, logprob: float = -0.5) -> ScoredToken:
    return ScoredToken(token, logprob, tuple(token.encode()))


HEART = "❤".encode()
TOKENS = [
    TokenAlternatives(plain("I"), (plain("I"), plain("We", -1.5))),
    TokenAlternatives(plain(" "), (plain("\n", -0.1), plain(" "))),
    TokenAlternatives(ScoredToken("\ufffd", -0.25, tuple(HEART[:2])), (ScoredToken("\ufffd", -0.1, (0,)),)),
    TokenAlternatives(ScoredToken("\ufffd", -0.0, tuple(HEART[2:])), ()),
    TokenAlternatives(plain("you"), (plain("you"), plain("me", -3.0))),
    TokenAlternatives(ScoredToken("<eos>", -2.0, None), (plain("!"),)),
]
TEXT = "I ❤you"
STORED: list[Stored] = json.loads(json.dumps([token.stored() for token in TOKENS]))


def test_stored_log_probabilities_are_read_back() -> None:
    assert [TokenAlternatives.read(row) for row in STORED] == TOKENS


def test_a_chat_has_every_token_with_its_bytes_and_alternatives() -> None:
    result = ChoiceLogprobs.model_validate(logprobs_object(CHAT_ENDPOINT, STORED, TEXT), strict=True)
    assert result.content is not None
    assert [t.token for t in result.content] == ["I", " ", "\ufffd", "\ufffd", "you", "<eos>"]
    assert b"".join(bytes(t.bytes or []) for t in result.content).decode() == TEXT
    assert result.content[-1].bytes is None
    assert [(t.token, t.logprob) for t in result.content[0].top_logprobs] == [("I", -0.5), ("We", -1.5)]


def test_a_completion_has_text_offsets_and_spells_parts_of_characters_as_bytes() -> None:
    result = Logprobs.model_validate(logprobs_object(COMPLETIONS_ENDPOINT, STORED, TEXT), strict=True)
    assert result.tokens == ["I", " ", "bytes:\\xe2\\x9d", "bytes:\\xa4", "you", "<eos>"]
    assert result.text_offset == [0, 1, 2, 2, 3, 6]
    assert result.token_logprobs == [-0.5, -0.5, -0.25, -0.0, -0.5, -2.0]
    assert result.top_logprobs is not None
    assert result.top_logprobs[1] == {"\n": -0.1, " ": -0.5}
    assert result.top_logprobs[2] == {"bytes:\\x00": -0.1, "bytes:\\xe2\\x9d": -0.25}


def test_a_text_cut_by_a_stop_string_has_no_offsets_beyond_its_end() -> None:
    result = logprobs_object(COMPLETIONS_ENDPOINT, STORED, "I ")
    assert result is not None
    assert result["text_offset"] == [0, 1, 2, 2, 2, 2]


def test_a_space_that_the_tokenizer_leaves_out_at_the_beginning_does_not_count() -> None:
    stored = [TokenAlternatives(plain(token), ()).stored() for token in (" Hello", " you")]
    result = logprobs_object(COMPLETIONS_ENDPOINT, stored, "Hello you")
    assert result is not None
    assert result["text_offset"] == [0, 5]


@pytest.mark.parametrize("endpoint", [CHAT_ENDPOINT, COMPLETIONS_ENDPOINT])
def test_log_probabilities_that_were_not_requested_are_none(endpoint: str) -> None:
    assert logprobs_object(endpoint, None, "text") is None
