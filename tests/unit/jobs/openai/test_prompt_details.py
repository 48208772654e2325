"""What an answer returns of its prompt: stored once, and read in the shapes of OpenAI and vLLM."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, SamplingParameters
from jobs.openai.logprobs import ScoredToken, TokenAlternatives, logprobs_object
from jobs.openai.prompt_details import PromptDetails, PromptToken


def scored(token: str, logprob: float | None) -> ScoredToken:
    return ScoredToken(token, logprob, tuple(token.encode()))


TOKENS = (
    PromptToken((9,), 0, TokenAlternatives(ScoredToken("<bos>", None, None), ())),
    PromptToken((1, 2, 3), 7, TokenAlternatives(scored("a", -5.0), (scored("b", -0.5), scored("c", -1.5)))),
    PromptToken((2, 2, 3), 1, TokenAlternatives(scored("b", -0.25), (scored("b", -0.25), scored("c", -2.5)))),
)


def asked(endpoint: str = COMPLETIONS_ENDPOINT, **options: object) -> PromptDetails:
    return PromptDetails.of(SamplingParameters.model_validate({"seed": 0, **options}), endpoint, [9, 1, 2])


@pytest.mark.parametrize(
    "details",
    [
        PromptDetails(),
        PromptDetails(token_ids=(9, 1, 2)),
        PromptDetails(top=0, tokens=TOKENS),
        PromptDetails(token_ids=(9, 1, 2), top=2, echo_top=1, named=True, tokens=TOKENS),
    ],
)
def test_what_is_stored_is_read_back(details: PromptDetails) -> None:
    assert PromptDetails.read(json.loads(json.dumps(details.stored()))) == details


def test_nothing_is_stored_where_nothing_is_asked_for() -> None:
    assert not asked(logprobs=2).wanted
    assert not asked(echo=True).wanted, "the text alone echoes the prompt"
    assert PromptDetails().stored() == {}
    assert PromptDetails.read(None) == PromptDetails()


@pytest.mark.parametrize(
    ("options", "scored_top"),
    [
        ({"prompt_logprobs": 3}, 3),
        ({"echo": True, "logprobs": 0}, 0),
        ({"echo": True, "logprobs": 5, "prompt_logprobs": 3}, 5),
        ({"return_token_ids": True}, None),
    ],
)
def test_as_many_alternatives_are_read_as_any_of_the_two_asks_for(
    options: dict[str, Any], scored_top: int | None
) -> None:
    assert asked(**options).scored_top == scored_top
    assert asked(**options).wanted


def test_a_chat_echoes_no_log_probabilities() -> None:
    assert asked(CHAT_ENDPOINT, echo=True, logprobs=1).echoed is None


def test_vllm_s_form_has_the_token_and_its_alternatives_by_id_and_null_first() -> None:
    fields = PromptDetails(top=1, tokens=TOKENS).fields()
    assert fields == {
        "prompt_logprobs": [
            None,
            {
                "1": {"logprob": -5.0, "rank": 7, "decoded_token": "a"},
                "2": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            },
            {"2": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}},
        ]
    }
    assert PromptDetails(top=0, tokens=TOKENS).fields()["prompt_logprobs"][1].keys() == {"1"}


def test_echoed_tokens_come_before_those_of_the_completion_and_special_ones_count_where_the_text_spells_them() -> None:
    echoed = PromptDetails(echo_top=1, tokens=TOKENS).echoed
    own = [TokenAlternatives(scored("!", -0.5), ()).stored()]
    for text, offsets in (("ab!", [0, 0, 1, 2]), ("<bos>ab!", [0, 5, 6, 7])):
        found = logprobs_object(COMPLETIONS_ENDPOINT, own, text, echoed)
        assert found is not None
        assert found["text_offset"] == offsets
        assert found["tokens"] == ["<bos>", "a", "b", "!"]
        assert found["token_logprobs"] == [None, -5.0, -0.25, -0.5]
        assert found["top_logprobs"] == [None, {"b": -0.5, "a": -5.0}, {"b": -0.25}, {"!": -0.5}]


def test_an_echo_without_a_completion_has_the_prompt_alone() -> None:
    found = logprobs_object(COMPLETIONS_ENDPOINT, None, "ab", PromptDetails(echo_top=0, tokens=TOKENS).echoed)
    assert found is not None
    assert found["token_logprobs"] == [None, -5.0, -0.25]


def test_tokens_named_by_their_ids_keep_their_bytes_and_offsets() -> None:
    echoed = PromptDetails(echo_top=2, named=True, tokens=TOKENS).echoed
    found = logprobs_object(COMPLETIONS_ENDPOINT, [], "ab", echoed)
    assert found is not None
    assert found["tokens"] == ["token_id:9", "token_id:1", "token_id:2"]
    assert found["top_logprobs"][1] == {"token_id:2": -0.5, "token_id:3": -1.5, "token_id:1": -5.0}
    assert found["text_offset"] == [0, 0, 1]
