"""Tools in prompts: each family's template gets tools and calls as it takes them, all others get Hermes' form."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import Environment
from jinja2.exceptions import TemplateError

from jobs.errors import InvalidValue
from jobs.messages import ChatMessage, FunctionTool, ToolCall, ToolChoice, Tools
from worker.text.tool_prompt import Render, ToolPrompt

# Templates of our own that take tools and calls as published ones of these families do.
QWEN = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ 'user' if m.role == 'tool' else m.role }}]"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{% set f = c.function %}<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}'
)
LLAMA = (
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}"
    "{% endif %}{% set f = m.tool_calls[0].function %}"
    '[assistant]{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
    "{% elif m.role == 'tool' %}[ipython]{{ m.content | tojson }}{% else %}[{{ m.role }}]"
    "{% if loop.first and tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{{ m.content }}"
    "{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{{ (c.function | tojson)[:-1] }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]'
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% else %}{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ m.content }}[/INST]"
    "{% endif %}{% endfor %}{% if tools %}{{ tools | length }}{{ tools[0].function.name }}{% endif %}"
)
DEEPSEEK = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.content is none %}{% for c in m.tool_calls %}"
    "{% if loop.first %}<｜tool▁calls▁begin｜>{% endif %}<｜tool▁call▁begin｜>"
    "{{ c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{% else %}[{{ m.role }}]{{ m.content + '' }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

FUNCTIONS = (
    FunctionTool(name="get_time"),
    FunctionTool(name="get_weather", description="It's <b>", parameters={"properties": {}}),
)
CALLS = (
    ToolCall(id="call_1", name="get_time", arguments='{"zone": "UTC"}'),
    ToolCall(id="call_2", name="get_weather", arguments="{}"),
)


def render(template: str) -> Render:
    environment = Environment()

    def fail(message: str) -> str:
        raise TemplateError(message)

    environment.globals["raise_exception"] = fail
    environment.policies["json.dumps_function"] = lambda value, **_: __import__("json").dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template)

    def rendered(turns: Any, tools: Any) -> str:
        try:
            return compiled.render(messages=turns, tools=tools)
        except Exception as error:
            raise InvalidValue(str(error)) from error

    return rendered


def prompt(template: str, takes_system: bool = True) -> ToolPrompt:
    return ToolPrompt(template, render(template), takes_system=takes_system)


def tools(choice: ToolChoice = "auto") -> Tools:
    return Tools(functions=FUNCTIONS, choice=choice)


def history(count: int = 2, content: str = "") -> list[ChatMessage]:
    return [
        ChatMessage(role="user", content="hi"),
        ChatMessage(role="assistant", content=content, tool_calls=CALLS[:count]),
        *(
            ChatMessage(role="tool", content=f"r{n}", tool_call_id=c.id, name=c.name)
            for n, c in enumerate(CALLS[:count])
        ),
    ]


def shown(template: str, messages: list[ChatMessage], functions: Tools | None = None) -> str:
    return render(template)(*prompt(template).turns(messages, functions))


@pytest.mark.parametrize(
    ("template", "name", "parallel"),
    [(QWEN, "hermes", True), (LLAMA, "llama3", False), (MISTRAL, "mistral", True), (DEEPSEEK, "deepseek_v31", True)],
)
def test_a_template_of_a_known_family_writes_tools_calls_and_results_itself(
    template: str, name: str, parallel: bool
) -> None:
    one = prompt(template)
    assert (one.native, one.format.name, one.parallel) == (True, name, parallel)
    calls = [(call.name, call.arguments) for call in CALLS[: 2 if parallel else 1]]
    text = shown(template, history(len(calls)), tools())
    assert "get_weather" in text
    assert "r0" in text
    if name != "mistral":  # which adds ids
        assert one.format.calls(calls).replace("\n<", "<").replace(">\n", ">") in text.replace("\n<", "<").replace(
            ">\n", ">"
        )


def test_content_beside_calls_is_a_turn_of_its_own_where_the_template_would_drop_it() -> None:
    assert "[assistant]first[assistant]{" in shown(LLAMA, history(1, "first"), tools())
    assert "[assistant]first<｜tool▁calls▁begin｜>" in shown(DEEPSEEK, history(1, "first"), tools())
    assert "[assistant]first<tool_call>" in shown(QWEN, history(1, "first"), tools())


def test_ids_fit_the_template_and_results_keep_those_of_their_calls() -> None:
    text = shown(MISTRAL, history(), None)
    ids = [part.split('"')[1] for part in text.split('"id"')[1:]]
    assert len(set(ids)) == 2
    assert all(f"r{n} {identity}[" in text for n, identity in enumerate(ids))


def test_a_template_without_tools_gets_them_as_text_in_hermes_form() -> None:
    one = prompt(PLAIN)
    assert (one.native, one.format.name) == (False, "hermes")
    text = shown(PLAIN, [ChatMessage(role="system", content="Be kind."), *history()], tools())
    assert text.startswith("[system]Be kind.\n\n# Tools\n")
    assert '{"type": "function", "function": {"name": "get_weather", "description": "It\'s <b>", "parameters"' in text
    assert (
        '[assistant]<tool_call>\n{"name": "get_time", "arguments": {"zone": "UTC"}}\n</tool_call>\n<tool_call>\n'
        in text
    )
    assert text.endswith("[user]<tool_response>\nr0\n</tool_response>\n<tool_response>\nr1\n</tool_response>")
    assert shown(PLAIN, history()[:1], tools()).startswith("[system]# Tools\n")


def test_a_template_without_system_messages_gets_the_tools_before_the_first_user() -> None:
    one = prompt(PLAIN, takes_system=False)
    text = render(PLAIN)(*one.turns(history()[:1], tools()))
    assert text.startswith("[user]# Tools\n")
    assert text.endswith("\n\nhi")


def test_a_conversation_without_tools_is_as_it_was() -> None:
    messages = [ChatMessage(role="user", content="hi"), ChatMessage(role="tool", content="x")]
    assert prompt(PLAIN).turns(messages, None) == (
        [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x"}],
        None,
    )


@pytest.mark.parametrize(
    "unknown",
    [
        QWEN.replace("<tool_call>\n", "<tool_call>\n<function=x>"),
        QWEN.replace("<tool_call>\n", "<tool_call>"),
        QWEN.replace('"arguments"', '"input"'),
        QWEN.replace("<tool_response>{{ m.content }}", "<tool_response>"),
    ],
)
def test_a_template_that_writes_calls_in_another_form_or_hides_results_is_not_given_tools(unknown: str) -> None:
    assert prompt(unknown).native is False
    assert "<tools>{" not in shown(unknown, history()[:1], tools())
