"""Grammars of calls take what a family's models write, in any tokens, and nothing that a schema forbids."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jobs.grammar.compiler import grammar_text
from jobs.messages import FunctionTool, GrammarSpec, ReasoningFormat, ToolChoice, Tools
from jobs.openai.call_formats import CALL_FORMATS, CallFormat, call_format
from worker.text.call_grammar import CallGrammar, after_reasoning

FUNCTIONS = (
    FunctionTool(
        name="get_weather",
        parameters={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    ),
    FunctionTool(name="get_time"),
    FunctionTool(
        name="get_time_2",
        parameters={"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"items": {"type": "number"}}}},
    ),
)
CALLS = [("get_weather", '{"city": "Paris"}'), ("get_time", "{}"), ("get_time_2", '{"a": [1, 2.5]}')]
MARKERS = re.compile(r"<｜[^｜]*｜>|\[[A-Z_]+\]|<\|python_tag\|>|</?tool_call>")


@cache
def tokenizer(markers: tuple[str, ...], special: bool) -> tuple[Tokenizer, LLTokenizer]:
    """Return a tokenizer of bytes that reads markers as one token each, and llguidance's view of it."""
    backend = Tokenizer(BPE(vocab={symbol: byte for byte, symbol in bytes_to_unicode().items()}, merges=[]))  # type: ignore[no-untyped-call]
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(["</s>"])
    backend.add_tokens([AddedToken(marker, special=special) for marker in markers])
    return backend, LLTokenizer(backend.to_str())


@cache
def compiled(tokens: LLTokenizer, lark: str) -> LLMatcher:
    matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


class Case:
    """A family's grammars, for a tokenizer that reads its markers as text, as special tokens, or as added tokens."""

    def __init__(self, form: CallFormat, kind: str) -> None:
        texts = (form.first, form.arguments, form.after, form.next or "", form.last, form.opening)
        markers = () if kind == "text" else tuple(dict.fromkeys(MARKERS.findall("".join(texts))))
        self.backend, self.tokens = tokenizer(markers, kind == "special")
        vocabulary = self.backend.get_vocab()
        added = {marker: vocabulary[marker] for marker in markers}
        self.grammar = CallGrammar(form, added)

    def takes(self, text: str, choice: ToolChoice = "required", **more: Any) -> bool:
        """Return whether an answer may be this text."""
        tools = Tools(functions=FUNCTIONS, choice=choice, **more)
        matcher = compiled(self.tokens, self.grammar.text(tools)).deep_copy()
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.fixture(params=[(form, kind) for form in CALL_FORMATS for kind in ("text", "special", "added")])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_a_grammar_takes_the_calls_of_its_family_and_refuses_others(case: Case) -> None:
    form = case.grammar.form
    calls = CALLS if form.next is not None else CALLS[:1]
    for choice in ("required", "auto"):
        assert case.takes(form.calls(calls), choice)
        assert case.takes(form.call(*CALLS[2]), choice)
        assert case.takes(form.call(*CALLS[0]), choice, parallel=False)
        assert len(calls) == 1 or not case.takes(form.calls(calls), choice, parallel=False)
        for name, arguments in [("get_weather", '{"town": 1}'), ("get_weather", '{"city": 1}'), ("nothing", "{}")]:
            assert not case.takes(form.call(name, arguments), choice)
        assert not case.takes(form.call(*CALLS[0]), choice, names=("get_time",))
        assert not case.takes(form.call("get_time", '{"zone": 1}'), choice), "it has no parameters"
    assert case.takes(form.call(*CALLS[1]), "named", names=("get_time",))
    assert not case.takes(form.call(*CALLS[0]), "named", names=("get_time",))


def test_text_is_free_until_a_call_begins_and_only_if_no_call_is_forced(case: Case) -> None:
    form = case.grammar.form
    call = form.call(*CALLS[0])
    for text in ("", "Hello, <you>! {1: [2]}\n", form.trigger[:-1]):
        assert case.takes(text, "auto")
        assert not case.takes(text)
    before = "" if form.at_start else "I look.\n"
    assert case.takes(before + call, "auto")
    assert not case.takes(before + call[:-1], "auto"), "a call that has begun ends"
    assert not case.takes(f"{before}{form.trigger}nothing", "auto")


def test_an_opening_may_precede_a_call() -> None:
    for kind in ("text", "special"):
        form = call_format("llama3")
        assert Case(form, kind).takes(form.opening + form.call(*CALLS[0]), "auto")


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json_schema", '{"properties": {"a": {"type": "integer"}}, "required": ["a"]}', '{"a": 1}', "{}"),
        ("json_object", "", '{"b": [1]}', "[]"),
        ("regex", "x[0-9]{2}", "x12", "x1"),
        ("choice", '["yes", "no"]', "no", "maybe"),
        ("grammar", 'start: "a" b\nb: "b"+', "abb", "a"),
    ],
)
def test_a_content_of_any_kind_is_bound_after_a_free_reasoning(kind: Any, value: str, good: str, bad: str) -> None:
    backend, tokens = tokenizer((), special=False)
    content = grammar_text(GrammarSpec(kind=kind, value=value))
    form = ReasoningFormat(start="<think>", end="</think>", opened=True)

    def takes(text: str, *, thought: bool) -> bool:
        matcher = LLMatcher(tokens, after_reasoning(content, form, thought=thought))
        assert not matcher.is_error(), matcher.get_error()
        ids = backend.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    for breaks in ("", "\n", "\n\n"):
        assert takes(breaks + good, thought=True)
        assert takes(f"I add: {bad} </think {breaks}</think>{breaks}{good}", thought=False)
        assert not takes(breaks + bad, thought=True)
        assert not takes(f"{good}</think>{breaks}{bad}", thought=False)
    assert not takes("I add", thought=False)
    assert not takes(f"I add</think>-</think>{good}", thought=False), "the first end marker ends it"
