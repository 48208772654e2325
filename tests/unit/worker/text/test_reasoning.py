"""Reasoning: its markers come from the model's own template, and its tokens are counted exactly."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from jobs.errors import InvalidValue, RequestFailed
from jobs.messages import (
    CHAT_ENDPOINT,
    COMPLETIONS_ENDPOINT,
    AnswerFormat,
    ChatMessage,
    GenerationRequest,
    SamplingParameters,
)
from jobs.openai.answers import split_answer
from tests.models import byte_tokenizer
from worker.engine.grammar.grammar import Grammar
from worker.engine.token_logprobs import TokenLogprobs
from worker.text.codec import Codec
from worker.text.reasoning import MARKERS, markers_of

EOS = 256
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}"
OPENS = TURNS + "{% if add_generation_prompt %}<bos>assistant: <think>\n{% endif %}"
WRITES = TURNS + "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
SILENT = TURNS + "{% if add_generation_prompt %}<bos>assistant: <think>\n\n</think>\n\n{% endif %}"


def codec(template: str, parser: str = "auto") -> Codec:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Codec(tokenizer, frozenset({EOS}), 4096, len(tokenizer), reasoning_parser=parser)


def form_of(one: Codec, said: str = "hello", endpoint: str = CHAT_ENDPOINT) -> AnswerFormat | None:
    request = GenerationRequest(
        model="m", messages=(ChatMessage(role="user", content=said),), sampling=SamplingParameters(seed=0)
    )
    return one.answer_format(request, endpoint, one.encode(request, CHAT_ENDPOINT))


@pytest.mark.parametrize(("template", "opened"), [(OPENS, True), (WRITES, False), (SILENT, False)])
def test_the_rendered_prompt_tells_whether_the_reasoning_is_open(template: str, opened: bool) -> None:
    form = form_of(codec(template), said="what is <think>")
    assert form is not None
    assert form.reasoning is not None
    assert (form.reasoning.start, form.reasoning.end, form.reasoning.opened) == ("<think>", "</think>", opened)


def test_a_model_whose_template_marks_no_reasoning_has_none() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert form_of(codec(plain), said="</think>") is None
    assert form_of(codec(plain, "qwen3")) is not None, "the setting names the markers"
    assert form_of(codec(OPENS, "off")) is None
    assert form_of(codec(OPENS), endpoint=COMPLETIONS_ENDPOINT) is None, "raw prompts have raw texts"
    for pair in MARKERS.values():
        assert markers_of(f"x{pair[1]}y") == pair


def test_tokens_up_to_the_end_marker_are_reasoning_and_the_rest_are_not() -> None:
    one = codec(WRITES)
    form = form_of(one)
    for text, tokens in [
        ("<think>I add.</think>4", len("<think>I add.</think>")),
        ("<think>I add", len("<think>I add")),
        ("4 </think>", 0),
        ("<thi", 0),
    ]:
        ids = list(text.encode())
        stream = one.stream(None, [1], CHAT_ENDPOINT, form)
        stream.push(ids, [False] * len(ids))
        assert stream.reasoning_tokens == tokens, text
        resumed = one.stream(None, [1], CHAT_ENDPOINT, form)
        resumed.resume(ids[:9], [False] * len(ids[:9]))
        resumed.push(ids[9:], [False] * len(ids[9:]))
        assert resumed.reasoning_tokens == tokens, text
    assert one.stream(None, [1], CHAT_ENDPOINT).reasoning_tokens is None


def test_markers_that_are_special_tokens_are_part_of_the_text_and_other_special_tokens_are_not() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{# [THINK] … [/THINK] #}"
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    start, end = (tokenizer.convert_tokens_to_ids(marker) for marker in ("[THINK]", "[/THINK]"))
    one = Codec(tokenizer, frozenset({EOS}), 4096, len(tokenizer))
    form = form_of(one)
    stream = one.stream(None, [1], CHAT_ENDPOINT, form)
    ids = [start, *b"I add.", 0xE2, end, *b"4", EOS]

    stream.push(ids, [False] * len(ids))
    stream.finish()

    assert split_answer(form, stream.text) == split_answer(form, "[THINK]I add.\ufffd[/THINK]4")
    assert stream.reasoning_tokens == len(ids) - 2
    scored = stream.readable_logprobs(ids, [TokenLogprobs(0.0, ()) for _ in ids])
    said = b"".join(bytes(one.chosen.bytes or ()) for one in scored)
    assert said == b"[THINK]I add.\xe2[/THINK]4", "the bytes are those of the text"


SWITCHED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.reasoning_content %} ({{ m.reasoning_content }}){% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>"
    "\n\n{% else %}<think>\n{% endif %}{{ reasoning_effort }}{{ style }}{% endif %}"
)


def rendered(template: str, **fields: object) -> str:
    one = codec(template)
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "sampling": {"seed": 0}}
    request = GenerationRequest.model_validate(body | fields)
    prompt = one.encode(request, CHAT_ENDPOINT)
    one.answer_format(request, CHAT_ENDPOINT, prompt)
    return one.decode(prompt)


def test_arguments_reach_the_template_by_the_names_that_it_reads() -> None:
    assert rendered(SWITCHED) == "user: hi\na: <think>\n"
    assert rendered(SWITCHED, reasoning={"enabled": False}) == "user: hi\na: <think>\n\n</think>\n\n"
    assert rendered(SWITCHED, reasoning={"enabled": True, "effort": "low"}).endswith("<think>\nlow")
    wins = {"enable_thinking": True, "style": "!"}
    assert rendered(SWITCHED, reasoning={"enabled": False}, chat_template_kwargs=wins).endswith("<think>\n!")
    said = rendered(SWITCHED, chat_template_kwargs={"style": "<eos>"})
    assert said.endswith("<think>\n<eos>"), "special tokens in arguments are text"


def test_a_reasoning_that_can_not_be_switched_off_refuses_only_to_be_switched_off() -> None:
    with pytest.raises(InvalidValue, match="can't switch its reasoning off"):
        rendered(OPENS, reasoning={"enabled": False})
    assert rendered(OPENS, reasoning={"enabled": True}).endswith("<think>\n")
    assert rendered(OPENS, chat_template_kwargs={"enable_thinking": False}).endswith("<think>\n"), "as vLLM ignores it"
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert rendered(plain, reasoning={"enabled": False, "effort": "none"}) == "hi", "there is none"


def test_templates_get_the_reasoning_of_earlier_answers_if_they_read_it() -> None:
    history = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "I add."},
        {"role": "user", "content": "hi"},
    ]
    assert "assistant: 2 (I add.)\n" in rendered(SWITCHED, messages=history)
    dumps = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert "I add." not in rendered(dumps, messages=history)


def test_an_error_of_the_template_is_the_error_of_its_request() -> None:
    refusing = (
        "{% if style %}{{ raise_exception('no style') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(InvalidValue, match="no style"):
        rendered(refusing, chat_template_kwargs={"style": "x"})
    assert rendered(refusing) == "hi"


HYBRID = (
    TURNS + "{% if add_generation_prompt %}<bos>assistant: {% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_a_text_whose_grammar_does_not_begin_fails_and_others_do_not() -> None:
    one = codec(OPENS)
    spelled = list(b"I add.</think>4")
    one.stream(None, [1], CHAT_ENDPOINT, form_of(one)).push(spelled, [False] * len(spelled))
    bound = one.stream(None, [1], CHAT_ENDPOINT, form_of(one), Grammar("", (EOS,)))
    with pytest.raises(RequestFailed, match="spelled out the end"):
        bound.push(spelled, [False] * len(spelled))
    unended = one.stream(None, [1], CHAT_ENDPOINT, form_of(one), Grammar("", (EOS,)))
    unended.push(spelled[:6], [False] * 6)
    with pytest.raises(RequestFailed, match="within the reasoning"):
        unended.end()
    one.stream(None, [1], CHAT_ENDPOINT, form_of(one)).end()


def test_only_a_grammar_makes_the_prompt_open_a_reasoning_that_the_model_begins_itself() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</think>"])
    tokenizer.chat_template = HYBRID
    one = Codec(tokenizer, frozenset({EOS}), 4096, len(tokenizer))
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "sampling": {"seed": 0}}

    def prompt(**fields: object) -> str:
        return one.decode(one.encode(GenerationRequest.model_validate(body | fields), CHAT_ENDPOINT))

    bound = {"grammar": {"kind": "regex", "value": "[0-9]"}}
    assert prompt() == "user: hi\nassistant: "
    assert prompt(**bound) == "user: hi\nassistant: <think>\n"
    assert prompt(**bound, reasoning={"enabled": False}) == prompt(reasoning={"enabled": False})
    assert prompt(reasoning={"enabled": False}).endswith("<think>\n\n</think>\n\n")


def test_a_grammar_binds_what_follows_the_end_marker_of_an_opened_reasoning() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</think>"])
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "sampling": {"seed": 0}}
    request = GenerationRequest.model_validate(body | {"grammar": {"kind": "regex", "value": "[0-9]"}})

    def after(template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
        tokenizer.chat_template = template
        one = Codec(tokenizer, frozenset({EOS}), 4096, len(tokenizer))
        bound = one.grammar(request, one.answer_format(request, CHAT_ENDPOINT, one.encode(request, CHAT_ENDPOINT)))
        assert bound is not None
        return bound.after

    assert after(OPENS, tokenizer) == (tokenizer.convert_tokens_to_ids("</think>"),)
    assert after(WRITES, tokenizer) == after(SILENT, tokenizer) == (), "it binds the whole text: no reasoning begins"
    assert after(HYBRID, tokenizer) == after(OPENS, tokenizer), "the prompt opens what the model would begin itself"
    assert after(OPENS, byte_tokenizer()) == (), "it binds from the text of a marker that is no token"
