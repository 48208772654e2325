"""Tools of a request: in its prompt, in the grammar of its answers, and in the text that its answers are read from."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.messages import (
    CHAT_ENDPOINT,
    ChatMessage,
    FunctionTool,
    GenerationRequest,
    GrammarSpec,
    SamplingParameters,
    ToolCall,
    Tools,
)
from jobs.openai.answers import split_answer
from jobs.openai.call_formats import HERMES, call_format
from tests.models import byte_tokenizer
from worker.text.codec import Codec

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
NATIVE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}{% endfor %}"
)
THINKING = "{# ends with </think> #}" + NATIVE
FUNCTION = FunctionTool(name="f", description="Do f.", parameters={"properties": {"a": {"type": "integer"}}})
CALL = HERMES.call("f", '{"a": 1}')


@cache
def compiled(tokenizer: str, grammar: str) -> LLMatcher:
    return LLMatcher(LLTokenizer(tokenizer), grammar)


@cache
def codec(template: str, *special: str) -> Codec:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return Codec(tokenizer, frozenset({256}), 4096, len(tokenizer))


def request(*messages: ChatMessage, function: FunctionTool = FUNCTION, **tools: Any) -> GenerationRequest:
    return GenerationRequest(
        model="m",
        messages=messages or (ChatMessage(role="user", content="hi"),),
        sampling=SamplingParameters(seed=0),
        tools=Tools(functions=(function,), **tools),
    )


def takes(one: Codec, asked: GenerationRequest, text: str) -> bool:
    """Return whether an answer to the request may be this text."""
    form = one.answer_format(asked, CHAT_ENDPOINT, one.encode(asked, CHAT_ENDPOINT))
    grammar = one.grammar(asked, form)
    assert grammar is not None
    matcher = compiled(one.tokenizer.backend_tokenizer.to_str(), grammar.text).deep_copy()
    ids = list(one.tokenizer.encode(text, add_special_tokens=False))
    if grammar.after:
        ids = ids[ids.index(grammar.after[0]) + 1 :]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("template", [PLAIN, NATIVE])
def test_the_prompt_has_the_tools_however_the_template_takes_them(template: str) -> None:
    one = codec(template)
    text = one.decode(one.encode(request(), CHAT_ENDPOINT))
    assert '{"type": "function", "function": {"name": "f", "description": "Do f.", "parameters": {' in text
    plain = request().model_copy(update={"tools": None})
    assert one.decode(one.encode(plain, CHAT_ENDPOINT)) == "[user]hi"


@pytest.mark.parametrize("template", [PLAIN, NATIVE])
def test_special_tokens_in_tools_and_calls_are_text(template: str) -> None:
    one = codec(template)
    call = ToolCall(id="call_1", name="f", arguments='{"a": "<eos>"}')
    messages = (ChatMessage(role="assistant", content="", tool_calls=(call,)), ChatMessage(role="user", content="x"))
    ids = one.encode(request(*messages, function=FunctionTool(name="f", description="<eos>")), CHAT_ENDPOINT)
    assert 256 not in ids
    assert bytes(ids).count(b"<eos>") == 2


def test_a_model_without_a_chat_template_takes_no_tools() -> None:
    tokenizer = byte_tokenizer(chat=False)
    one = Codec(tokenizer, frozenset({256}), 4096, len(tokenizer))
    with pytest.raises(InvalidValue, match="no chat template") as refused:
        one.encode(request().model_copy(update={"messages": None, "prompt": "hi"}), CHAT_ENDPOINT)
    assert refused.value.param == "tools"


def test_a_special_token_in_the_name_of_a_parameter_is_refused() -> None:
    function = FunctionTool(name="f", parameters={"properties": {"<eos>": {}}})
    with pytest.raises(InvalidValue, match="special token <eos>") as refused:
        codec(NATIVE).encode(request(function=function), CHAT_ENDPOINT)
    assert refused.value.param == "tools"


def test_a_template_that_escapes_a_special_token_is_refused_it() -> None:
    escaping = NATIVE.replace("t | tojson", "t | string")
    with pytest.raises(InvalidValue, match="escapes special tokens"):
        codec(escaping).encode(request(function=FunctionTool(name="f", description="<eos>")), CHAT_ENDPOINT)


def test_markers_that_are_special_tokens_stay_in_the_text_of_a_request_with_tools() -> None:
    one = codec(NATIVE, "<tool_call>", "</tool_call>", "<other>")
    ids = list(one.tokenizer.encode("a <other>" + CALL, add_special_tokens=False))
    for choice in ("auto", "none"):
        asked = request(choice=choice)
        form = one.answer_format(asked, CHAT_ENDPOINT, [1])
        stream = one.stream(endpoint=CHAT_ENDPOINT, form=form)
        stream.push(ids, [False] * len(ids))
        stream.finish()
        if choice == "none":
            assert form is None
            assert "<" not in stream.text
        else:
            answer = split_answer(form, stream.text)
            assert (answer.content, answer.calls) == ("a", (("f", '{"a": 1}'),))


def test_a_request_whose_model_may_not_call_has_no_grammar() -> None:
    one = codec(PLAIN)
    assert one.grammar(request(choice="none"), one.answer_format(request(choice="none"), CHAT_ENDPOINT, [1])) is None


def test_an_answer_is_of_the_response_format_or_a_call() -> None:
    schema = GrammarSpec(kind="json_schema", value='{"type": "object", "required": ["b"]}')
    for spec, answer in ((schema, '{"b": 1}'), (GrammarSpec(kind="choice", value='["yes", "no"]'), "no")):
        for template in (PLAIN, THINKING):
            one, asked = codec(template, "<tool_call>"), request().model_copy(update={"grammar": spec})
            assert takes(one, asked, answer)
            assert takes(one, asked, CALL)
            assert not takes(one, asked, "free text")
            assert not takes(one, asked, answer + CALL)
    forced = request(choice="required").model_copy(update={"grammar": schema})
    assert takes(codec(PLAIN), forced, CALL)
    assert not takes(codec(PLAIN), forced, '{"b": 1}')


def test_calls_that_are_json_can_t_be_told_from_an_answer_of_a_grammar() -> None:
    call = '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{# ipython #}'
    llama = NATIVE.replace("<tool_call>\n{{ c.function | tojson }}\n</tool_call>", call)
    asked = request().model_copy(update={"grammar": GrammarSpec(kind="json_object")})
    with pytest.raises(UnsupportedParameter, match="set tool_choice to none or required"):
        takes(codec(llama), asked, "{}")


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("opened", [False, True])
def test_a_reasoning_comes_before_the_calls_and_is_free(special: tuple[str, ...], opened: bool) -> None:
    one = codec(THINKING + ("<think>\n" if opened else ""), *special)
    thought = "<think>"[: 0 if opened else None] + "\nI { think.\n</think>\n\n"
    for choice in ("auto", "required"):
        asked = request(choice=choice)
        assert takes(one, asked, thought + CALL)
        assert not takes(one, asked, thought + CALL[:-1])
        assert takes(one, asked, thought + "yes") is (choice == "auto")
        if not opened:
            assert takes(one, asked, CALL)


def test_the_form_of_a_call_is_stored_so_that_another_worker_reads_the_text_alike() -> None:
    one = codec(NATIVE)
    form = one.answer_format(request(choice="named", names=("f",)), CHAT_ENDPOINT, [1])
    assert form is not None
    assert form.model_dump(mode="json") == {"calls": {"form": "hermes", "named": True}}
    assert call_format("hermes") == HERMES
    assert json.loads(json.dumps(form.model_dump(mode="json")))
