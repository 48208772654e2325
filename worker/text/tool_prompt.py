"""Write tools, calls and their results into a conversation, as the model's chat template takes them.

A template is probed at load time: whether it shows tools, wants arguments as an object or as text, and shows content
beside calls. A template that takes no tools, or is of no known family, gets Hermes' form instead: the functions in the
system message, calls in assistant messages, and results in user messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jobs.errors import InvalidValue
from jobs.messages import ChatMessage, FunctionTool, ToolCall, Tools
from jobs.openai.call_formats import HERMES, CallFormat, detect

Turn = dict[str, Any]  # a message as templates take it
Render = Callable[[Sequence[Turn], Sequence[Turn] | None], str]  # messages and tools; raises InvalidValue

_SHORT_ID_CHARS: Final = 9  # Mistral's templates take no others
_TEXT: Final = "7dcb04"  # of a probe; occurs in no template
_CONTENT: Final = "5e21fb"  # beside calls
_RESULT: Final = "c09d3a"  # of calls
_FUNCTIONS: Final = ("probe_a7dcb04", "probe_b7dcb04")
_TOOL: Final = FunctionTool(
    name=_FUNCTIONS[0],
    description=_TEXT,
    parameters={"type": "object", "properties": {_TEXT: {"type": "string", "description": _TEXT}}},
)
_BLOCK: Final = """\
# Tools

You can call functions. Each line between <tools> and </tools> describes one of them:
<tools>
{functions}
</tools>

To call a function, write its name and its arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "FUNCTION", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>

You then get its result between <tool_response> and </tool_response>."""


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template takes a message with calls."""

    arguments_as_text: bool = False  # else as an object
    empty_content: str | None = ""  # of a message that has calls only
    shows_content: bool = True  # beside calls
    short_ids: bool = False

    def turns(self, message: ChatMessage) -> Iterator[Turn]:
        """Yield the turns of an assistant message with calls."""
        content: str | None = message.content or self.empty_content
        if message.content and not self.shows_content:
            yield {"role": message.role, "content": message.content}
            content = self.empty_content
        yield {
            "role": message.role,
            "content": content,
            "tool_calls": [self._call(call) for call in message.tool_calls],
        }

    def result(self, message: ChatMessage) -> Turn:
        """Return the turn of a tool message."""
        identity = {} if message.tool_call_id is None else {"tool_call_id": self._id(message.tool_call_id)}
        name = {} if message.name is None else {"name": message.name}
        return _turn(message) | identity | name

    def _call(self, call: ToolCall) -> Turn:
        arguments = call.arguments if self.arguments_as_text else json.loads(call.arguments)
        return {"id": self._id(call.id), "type": "function", "function": {"name": call.name, "arguments": arguments}}

    def _id(self, identity: str) -> str:
        fits = not self.short_ids or (len(identity) == _SHORT_ID_CHARS and identity.isalnum())
        return identity if fits else hashlib.sha256(identity.encode()).hexdigest()[:_SHORT_ID_CHARS]


_STYLES: Final = tuple(
    CallStyle(as_text, empty, short_ids=short)
    for short in (False, True)
    for empty in ("", None)
    for as_text in (False, True)
)


class ToolPrompt:
    """How one model reads tools and writes calls."""

    def __init__(self, template: str, render: Render, *, takes_system: bool) -> None:
        """Probe a template; `takes_system`: it shows system messages."""
        self._render = render
        self._takes_system = takes_system
        family = detect(template)
        style = self._find_style(family) if family is not None and self._shows_tools() else None
        self.native = style is not None
        self.format: CallFormat = family if family is not None and self.native else HERMES
        self._style = style or CallStyle()
        self.parallel = self.format.next is not None and (
            not self.native or self._shows_calls(self.format, self._style, _FUNCTIONS)
        )

    def turns(self, messages: Sequence[ChatMessage], tools: Tools | None) -> tuple[list[Turn], list[Turn] | None]:
        """Return a conversation and its tools as the template takes them."""
        if self.native:
            turns = [turn for message in messages for turn in self._native_turns(message)]
            return turns, None if tools is None else [definition(one) for one in tools.functions]
        if tools is None and not any(message.tool_calls for message in messages):
            return [_turn(message) for message in messages], None
        turns = list(_hermes_turns(messages))
        return turns if tools is None else self._with_block(turns, tools.functions), None

    def _native_turns(self, message: ChatMessage) -> Iterable[Turn]:
        if message.tool_calls:
            return self._style.turns(message)
        return [self._style.result(message) if message.role == "tool" else _turn(message)]

    def _with_block(self, turns: list[Turn], functions: Iterable[FunctionTool]) -> list[Turn]:
        """Return the turns with the functions in the system message, or before the text of the first user."""
        lines = "\n".join(json.dumps(definition(one), ensure_ascii=False) for one in functions)
        block = _BLOCK.format(functions=lines)
        role = "system" if self._takes_system else "user"
        at = next((i for i, turn in enumerate(turns) if turn["role"] == role), None)
        if at is None or (self._takes_system and at > 0):
            return [{"role": role, "content": block}, *turns]
        own = turns[at]["content"]
        parts = (own, block) if self._takes_system else (block, own)
        joined = {"role": role, "content": "\n\n".join(part for part in parts if part)}
        return [*turns[:at], joined, *turns[at + 1 :]]

    def _shows_tools(self) -> bool:
        shown = self._rendered([{"role": "user", "content": _TEXT}], [definition(_TOOL)])
        return _TOOL.name in shown

    def _find_style(self, family: CallFormat) -> CallStyle | None:
        """Return the first style in which the template shows a call in the family's form, and its result.

        It has content beside the call if the template shows both. None: the template writes calls otherwise.
        """
        found = next((style for style in _STYLES if self._shows_calls(family, style, _FUNCTIONS[:1])), None)
        if found is None:
            return None
        shows_content = self._shows_calls(family, found, _FUNCTIONS[:1], content=_CONTENT)
        return CallStyle(found.arguments_as_text, found.empty_content, shows_content, found.short_ids)

    def _shows_calls(self, family: CallFormat, style: CallStyle, names: Sequence[str], content: str = "") -> bool:
        calls = tuple(
            ToolCall(id=f"call_{n:024x}", name=name, arguments=json.dumps({name: n})) for n, name in enumerate(names)
        )
        called = ChatMessage(role="assistant", content=content, tool_calls=calls)
        results = [ChatMessage(role="tool", content=_RESULT, tool_call_id=call.id, name=call.name) for call in calls]
        turns = [{"role": "user", "content": "a"}, *style.turns(called), *map(style.result, results)]
        shown = self._rendered(turns, [definition(_TOOL)])
        texts = [f'{name}{family.arguments}{{"{name}": {n}' for n, name in enumerate(names)]
        return all(text in shown for text in (content, _RESULT, f"{family.first}{names[0]}", *texts))

    def _rendered(self, turns: Sequence[Turn], tools: Sequence[Turn]) -> str:
        try:
            return self._render(turns, tools)
        except InvalidValue:
            return ""


def definition(function: FunctionTool) -> Turn:
    """Return a function as templates take it."""
    fields: Turn = {"name": function.name}
    if function.description is not None:
        fields["description"] = function.description
    fields["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": fields}


def _turn(message: ChatMessage) -> Turn:
    """Return a message without its calls."""
    return message.model_dump(exclude={"tool_calls", "tool_call_id", "name"})


def _hermes_turns(messages: Sequence[ChatMessage]) -> Iterator[Turn]:
    """Yield a conversation with calls and results as text; results that follow each other are one turn."""
    results: list[str] = []
    for message in messages:
        if message.role == "tool":
            results.append(f"<tool_response>\n{message.content}\n</tool_response>")
            continue
        yield from _results_turn(results)
        results = []
        written = HERMES.calls([(call.name, call.arguments) for call in message.tool_calls])
        yield _turn(message) | {"content": "\n".join(part for part in (message.content, written) if part)}
    yield from _results_turn(results)


def _results_turn(results: Sequence[str]) -> Iterable[Turn]:
    return [{"role": "user", "content": "\n".join(results)}] if results else []
