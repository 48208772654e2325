"""Text in and out: prompts that don't fit are refused by name, and streamed pieces add up to the decoded text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from jobs.errors import InvalidValue, PromptTooLong
from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, ChatMessage, GenerationRequest, SamplingParameters
from tests.models import byte_tokenizer
from worker.engine.errors import TokenizersDiffer
from worker.engine.sampling.penalties import adjustments_of
from worker.engine.sampling.sampling import adjust, draw
from worker.engine.sequence import FinishReason
from worker.engine.speculation.decision import Decision
from worker.engine.stats import StepResult, StepStats
from worker.loading.drafts import shared_vocabulary
from worker.text.codec import Codec, eos_ids
from worker.text.output_stream import OutputStream

EOS = 256


def codec(context_tokens: int = 100, chat: bool = True) -> Codec:
    return Codec(byte_tokenizer(chat), frozenset({EOS}), context_tokens, vocabulary=258)


def request(
    prompt: str | None = "hi", messages: tuple[ChatMessage, ...] | None = None, **sampling: Any
) -> GenerationRequest:
    parameters = SamplingParameters.model_validate({"seed": 1, **sampling})
    return GenerationRequest(
        model="m", prompt=prompt if messages is None else None, messages=messages, sampling=parameters
    )


def test_a_prompt_on_the_chat_endpoint_is_one_user_message() -> None:
    as_prompt = codec().encode(request("hi"), CHAT_ENDPOINT)
    as_message = codec().encode(request(messages=(ChatMessage(role="user", content="hi"),)), CHAT_ENDPOINT)
    assert as_prompt == as_message
    assert codec().decode(as_prompt) == "user: hi\nassistant: "


def test_a_prompt_on_the_completions_endpoint_is_tokenized_as_it_is() -> None:
    assert codec().decode(codec().encode(request("hi"), COMPLETIONS_ENDPOINT)) == "hi"


def test_the_template_adds_its_special_tokens_once() -> None:
    assert codec().encode(request("hi"), CHAT_ENDPOINT).count(257) == 2


def test_a_prompt_that_fills_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(PromptTooLong, match=r"has 30 tokens .* context of 30 tokens") as refused:
        codec(30).encode(request("x" * 30), COMPLETIONS_ENDPOINT)
    assert refused.value.param == "prompt"


def test_a_token_that_the_tokenizer_knows_and_the_model_does_not_is_refused() -> None:
    short = Codec(byte_tokenizer(), frozenset({EOS}), context_tokens=100, vocabulary=61)
    with pytest.raises(InvalidValue, match="beyond the model's vocabulary of 61 tokens"):
        short.encode(request("hi"), COMPLETIONS_ENDPOINT)


def test_a_prompt_that_leaves_space_for_one_token_is_accepted() -> None:
    ids = codec(30).encode(request("x" * 29), COMPLETIONS_ENDPOINT)
    assert codec(30).sequence((0,), ids, request().sampling, 0).max_tokens == 1


@pytest.mark.parametrize("max_tokens", [99, 100, 101, 2**31 - 1])
def test_max_tokens_beyond_what_the_prompt_leaves_of_the_context_are_reduced(max_tokens: int) -> None:
    assert codec(100).sequence((0,), [1, 2], request(max_tokens=max_tokens).sampling, 0).max_tokens == 98


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "789"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "012"),
        ({"truncate_prompt_tokens": 10}, "0123456789"),
        ({"truncate_prompt_tokens": 11}, "0123456789"),
        ({"truncate_prompt_tokens": -1}, "456789"),  # of a context of 7
        ({"truncate_prompt_tokens": -1, "max_tokens": 5}, "89"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 5, "truncation_side": "right"}, "01"),
    ],
)
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_prompt_is_truncated_to_what_the_request_asks_for(options: dict[str, Any], kept: str, as_ids: bool) -> None:
    small = codec(7 if options["truncate_prompt_tokens"] < 0 else 100)
    text = "0123456789"
    body = request(None if as_ids else text, **options)
    body = body.model_copy(update={"prompts": (tuple(text.encode()),)}) if as_ids else body
    ((*ids,),) = small.encode_all(body, COMPLETIONS_ENDPOINT)
    assert bytes(ids).decode() == kept


def test_a_truncated_prompt_must_fit_as_any_other() -> None:
    with pytest.raises(PromptTooLong):
        codec(5).encode(request("0123456789", truncate_prompt_tokens=5), COMPLETIONS_ENDPOINT)
    with pytest.raises(InvalidValue, match="leaves no room for a prompt") as refused:
        codec(5).encode(request("0123456789", truncate_prompt_tokens=-1, max_tokens=5), COMPLETIONS_ENDPOINT)
    assert refused.value.param == "truncate_prompt_tokens"


@pytest.mark.parametrize(("asked", "raw", "chat"), [(None, 1, 2), (True, 1, 3), (False, 0, 2)])
def test_special_tokens_are_added_to_raw_prompts_and_not_to_chats_unless_asked(
    asked: bool | None, raw: int, chat: int
) -> None:
    one = codec()
    one.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 257), ("<eos>", EOS)]
    )
    ids = one.encode(request("hi", add_special_tokens=asked), COMPLETIONS_ENDPOINT)
    assert (ids.count(257), ids.count(EOS)) == (raw, raw)
    ids = one.encode(request("hi", add_special_tokens=asked), CHAT_ENDPOINT)
    assert (ids.count(257), ids.count(EOS)) == (chat, chat - 2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stop": ("b",)}, "a"),
        ({"stop": ("b",), "min_tokens": 1}, "a"),
        ({"stop": ("b",), "min_tokens": 2}, "abca"),
        ({"stop": ("b",), "min_tokens": 5}, "abcab"),
        ({"stop": ("b",), "include_stop_str_in_output": True}, "ab"),
        ({"stop": ("b",), "include_stop_str_in_output": True, "min_tokens": 2}, "abcab"),
        ({}, "abcab"),
        ({"include_stop_str_in_output": True}, "abcabz"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 6])
def test_the_text_ends_where_the_request_says_however_many_tokens_a_step_has(
    options: dict[str, Any], text: str, step: int
) -> None:
    ids = list(b"abcabz")  # z is a stop token
    stream = OutputStream(0, codec().stream(request(**options).sampling))
    for at in range(0, len(ids), step):
        if not stream.finished:
            some = tuple(ids[at : at + step])
            stream.take(step_result(some, FinishReason.STOP if some[-1] == ids[-1] else None))
    assert stream.text == text
    assert stream.finish_reason is FinishReason.STOP


def step_result(tokens: tuple[int, ...], finish_reason: FinishReason | None) -> StepResult:
    stats = StepStats(0, 0, 0, 0, len(tokens), 0.0, 0.0, 0.0, 0.0, 1, None, None, Decision.OFF)
    return StepResult(0, tokens, finish_reason, stats)


def test_messages_that_the_template_refuses_name_the_field() -> None:
    with pytest.raises(InvalidValue, match="no tools") as refused:
        codec().encode(request(messages=(ChatMessage(role="tool", content="x"),)), CHAT_ENDPOINT)
    assert refused.value.param == "messages"


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(InvalidValue, match="no chat template"):
        codec(chat=False).encode(request(messages=(ChatMessage(role="user", content="x"),)), CHAT_ENDPOINT)


def test_choices_of_a_request_have_noise_of_their_own() -> None:
    keys = {codec().sequence((i,), [1], request().sampling, i).sampling.key for i in range(4)}
    assert len(keys) == 4


@pytest.mark.parametrize("text", ["plain", "zwölf Bücher", "日本語 🙂 end", "a\u2028b"])
def test_streamed_pieces_are_whole_characters_and_add_up(text: str) -> None:
    ids = [*codec().encode(request(text), COMPLETIONS_ENDPOINT), EOS]
    stream = codec().stream()
    pieces = [piece for i, token in enumerate(ids) for piece in stream.push([token], [i % 2 == 0])]
    assert not stream.finish(ids)
    assert "".join(chunk for chunk, _ in pieces) == stream.text == codec().decode(ids) == text
    assert all("\ufffd" not in chunk for chunk, _ in pieces)


def test_a_text_cut_inside_a_character_is_finished_as_the_tokenizer_decodes_it() -> None:
    ids = codec().encode(request("naïve 🙂"), COMPLETIONS_ENDPOINT)[:-2]
    stream = codec().stream()
    stream.push(ids, [False] * len(ids))
    stream.finish(ids)
    assert stream.text == codec().decode(ids)


def test_neighbouring_tokens_of_one_source_are_one_piece() -> None:
    ids = codec().encode(request("abcd"), COMPLETIONS_ENDPOINT)
    assert codec().stream().push(ids, [True, True, False, True]) == [("ab", "draft"), ("c", "target"), ("d", "draft")]


def test_every_end_of_sequence_id_counts() -> None:
    tokenizer = byte_tokenizer()

    assert eos_ids(tokenizer, GenerationConfig(eos_token_id=[3, 256])) == {3, EOS}  # type: ignore[no-untyped-call]
    assert eos_ids(tokenizer, None) == {EOS}


def test_tokenizers_that_spell_most_ids_differently_are_refused_by_the_first_of_them() -> None:
    theirs = byte_tokenizer()
    words = {token: (i + 1) % 256 if i < 200 else i for token, i in byte_tokenizer().get_vocab().items()}
    theirs.get_vocab = lambda: words  # type: ignore[method-assign]
    with pytest.raises(TokenizersDiffer, match=r"share 58 of 258 token ids; id 0 is"):
        shared_vocabulary(byte_tokenizer(), theirs, "big", "small", 258)


def test_of_tokenizers_that_differ_in_one_token_the_others_are_drafted() -> None:
    longer, renamed = byte_tokenizer(), byte_tokenizer()
    longer.add_tokens(["<extra>"])
    words = {("<begin>" if token == "<bos>" else token): i for token, i in renamed.get_vocab().items()}
    renamed.get_vocab = lambda: words  # type: ignore[method-assign]
    for target, draft, known, shared in [
        (byte_tokenizer(), longer, 259, range(258)),
        (longer, byte_tokenizer(), 258, range(258)),
        (byte_tokenizer(), renamed, 258, range(257)),
        (byte_tokenizer(), byte_tokenizer(), 200, range(200)),
    ]:
        found = shared_vocabulary(target, draft, "big", "small", known)
        assert found.ids.tolist() == list(shared)
        assert found.readable == known


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 1e-300), ("temperature", 1e-46), ("repetition_penalty", 1e-300)]
)
def test_sampling_values_that_are_zero_in_float32_give_finite_logits(field: str, value: float) -> None:
    parameters = SamplingParameters.model_validate({"seed": 1, "temperature": 1.0, field: value})
    sampling = codec().sequence((0,), [1, 2], parameters, 0).sampling
    adjustments = adjustments_of([sampling.bias], [(np.arange(3), np.ones(3, np.int64))])
    scores = adjust(torch.tensor([[0.0, -1.0, 3.0]]), sampling.record, adjustments)
    assert draw(scores, sampling.record, np.array([2]))[0] >= 0
    assert scores.isfinite().all()
