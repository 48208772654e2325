"""Tool calls in texts: every family's calls are read back, however the text arrives, and what is no call is content."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from jobs.openai.call_formats import CALL_FORMATS, HERMES, CallFormat, call_format, detect
from jobs.openai.call_parser import CallParser, Piece

ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"city": 'a "quoted\\ place', "n": [1, {"deep": "}]"}]},
    {},
    {"text": "<tool_call>\n{[]} ```<｜tool▁call▁end｜>"},
)
Read = tuple[str, list[tuple[str, str]]]  # content, and each call's name and arguments


def joined(pieces: Iterable[Piece]) -> Read:
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, str):
            content += piece
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, piece.arguments))
        else:
            name, arguments = calls[piece.index]
            calls[piece.index] = (name, arguments + piece.arguments)
    return content, calls


def read(form: CallFormat, *parts: str) -> Read:
    parser = CallParser(form)
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined([*pieces, *parser.finish()])


def calls_of(form: CallFormat, count: int) -> list[tuple[str, str]]:
    written = [(f"do-it_{n}", json.dumps(arguments)) for n, arguments in enumerate(ARGUMENTS[:count])]
    return written if form.next is not None else written[:1]


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("count", [1, 3])
def test_calls_are_read_back_with_the_content_before_them(form: CallFormat, count: int) -> None:
    calls = calls_of(form, count)
    assert read(form, form.calls(calls)) == ("", calls)
    assert read(form, form.opening + form.calls(calls) + "\n") == ("", calls)
    before = "" if form.at_start else "Let me see <to.\n"
    assert read(form, before + form.calls(calls)) == (before.rstrip(), calls)


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)
def test_the_parts_do_not_depend_on_how_the_text_is_cut(form: CallFormat) -> None:
    chosen = random.Random(0)
    whole = form.calls(calls_of(form, 3))
    texts = [
        "no call",
        f"  {whole}",
        f"I {form.first}x! {whole} bye \n",
        f"{whole}\n\n{whole}",
        f"{form.opening}x {whole}",
    ]
    for text in [*texts, *(whole[: chosen.randrange(len(whole))] for _ in range(12))]:
        expected = read(form, text)
        assert read(form, *text) == expected, f"{text!r} one character at a time"
        for _ in range(4):
            cuts = sorted(chosen.sample(range(len(text)), min(3, len(text))))
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            assert read(form, *parts) == expected, parts


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda form: form.name)
def test_a_text_without_a_call_is_content_to_the_last_character(form: CallFormat) -> None:
    long_name = form.first + "n" * 65 + form.arguments + "{}" + form.after
    for text in [
        "",
        " \n",
        "a  b\n ",
        form.trigger[:-1],
        form.first,
        f"a {form.first}b c",
        long_name,
        f"{form.first}f{form.arguments}[1]",
    ]:
        assert read(form, text) == (text, [])


def test_a_call_that_is_cut_keeps_the_arguments_so_far_and_a_begun_one_behind_it_is_left_out() -> None:
    whole = HERMES.calls([("f", '{"a": "b c"}'), ("g", "{}")])
    assert read(HERMES, whole[: whole.index(" c")]) == ("", [("f", '{"a": "b')])
    assert read(HERMES, whole[: whole.rindex("g")]) == ("", [("f", '{"a": "b c"}')])
    parser = CallParser(HERMES)
    parser.push(whole[: whole.index(" c")])
    assert parser.open_call
    parser.push(whole[whole.index(" c") :])
    assert not parser.open_call


def test_a_llama_calls_at_the_start_or_not_at_all() -> None:
    form = call_format("llama3")
    call = form.call("f", "{}")
    assert read(form, f"I say {call}") == (f"I say {call}", [])
    assert read(form, f"\n<|python_tag|>{call}") == ("", [("f", "{}")])
    assert read(form, "<|python_tag|>print(1)") == ("<|python_tag|>print(1)", [])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>\\n{{ call | tojson }}\\n</tool_call>", "hermes"),
        ("<tool_call>\\n<function={{ name }}>", None),
        ("<tool_call>{{ name }}\\n<arg_key>", None),
        ('{"name": "{{ name }}", "parameters": {{ a }}} <|start_header_id|>ipython', "llama3"),
        ('"[TOOL_CALLS] ["', "mistral"),
        ('"[TOOL_CALLS]["', "mistral_tekken"),
        ("'[TOOL_CALLS]' + name + '[ARGS]'", "mistral_args"),
        ("<｜tool▁calls▁begin｜>{{ t }}\\n```json\\n", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>{{ name }}<｜tool▁sep｜>", "deepseek_v31"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_family_is_read_from_the_text_of_the_template(template: str, name: str | None) -> None:
    found = detect(template)
    assert (None if found is None else found.name) == name
