"""Translate a body of /v1/responses into one of /v1/chat/completions: the same conversation gives the same text.

The parser reads the result as a chat. Errors name the fields of the body that was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from jobs.errors import InvalidValue, MissingParameter, RequestRefused, UnknownResponse, UnsupportedParameter
from jobs.messages import RESPONSES_ENDPOINT, ChatMessage, Endpoint, ResponseOptions
from jobs.submission.parameters.tools import other_tool
from jobs.submission.values import boolean, check_metadata, kind, object_fields, refuse_unknown, shown, text

Json = dict[str, Any]

_LOGPROBS: Final = "message.output_text.logprobs"
_INCLUDABLE: Final = frozenset(
    {
        _LOGPROBS,
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)
_REASONING_HINTS: Final = frozenset({"summary", "generate_summary", "mode", "context"})
_FUNCTION: Final = ("name", "description", "parameters", "strict")
_FUNCTION_HINTS: Final = frozenset({"type", "allowed_callers", "async", "defer_loading", "output_schema"})
_SCHEMA: Final = ("name", "description", "schema", "strict")
_ECHOED: Final = ("text", "reasoning", "metadata")
_ECHOED_HINTS: Final = ("user", "safety_identifier", "prompt_cache_key")  # dropped: their values need not be texts
_MAX_HINT_CHARS: Final = 512
_MAX_REFERENCES: Final = 128  # each is a read of the database
_MESSAGE: Final = re.compile(r"messages\[(\d+)\](.*)", re.DOTALL)
_FUNCTION_PATH: Final = re.compile(r"(tools\[\d+\]|tool_choice)\.(?:function|allowed_tools)(?=[.\[]|$)")
# Fields of a chat, and the fields of the body that they stand for.
_GIVEN_NAMES: Final = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}


def no_response(response_id: str, param: str) -> UnknownResponse:
    """Return the refusal of an id that no response has."""
    return UnknownResponse(f"There is no response {response_id[:80]!r}.", param=param)


class History:
    """The responses that a caller may continue; without a database there are none."""

    def conversation(self, response_id: str, param: str) -> Sequence[ChatMessage]:
        """Return the messages that a response has read, and its answer; raise RequestRefused without one."""
        raise no_response(response_id, param)

    def item(self, identity: str, param: str) -> Json:
        """Return an item of the output of a response; raise RequestRefused if there is none with this id."""
        raise UnknownResponse(f"There is no item {identity[:80]!r}.", param=param)


@dataclass(slots=True)
class Conversation:
    """The messages of a chat, and for each the place in the body that it comes from."""

    messages: list[Json] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    reasoning: str = ""  # of the answer that comes next

    def add(self, message: Json, place: str) -> None:
        """Append a message."""
        if message.get("role") == "assistant" and self.reasoning:
            message = {"reasoning_content": self.reasoning} | message
        self.reasoning = ""
        self.messages.append(message)
        self.places.append(place)


def chat_parameters(fields: Mapping[str, Any]) -> Json:
    """Return the parameters of a body, without nulls, under their names on the chat endpoint."""
    chat = dict(fields)
    if "max_output_tokens" in chat:
        chat["max_completion_tokens"] = chat.pop("max_output_tokens")
    if "truncation" in chat:
        chat |= _truncation(chat.pop("truncation"))
    if "text" in chat:
        chat |= _text(chat.pop("text"), chat)
    if "reasoning" in chat:
        chat["reasoning"] = _reasoning(chat["reasoning"])
    if "tools" in chat:
        chat["tools"] = _tools(chat["tools"])
    if "tool_choice" in chat:
        chat["tool_choice"] = _tool_choice(chat["tool_choice"])
    if _LOGPROBS in _include(chat.pop("include", [])) or chat.get("top_logprobs"):
        chat.setdefault("logprobs", True)
    return chat


def read_conversation(fields: Mapping[str, Any], history: History) -> Conversation:
    """Return the messages of a body: its instructions, the conversation of the previous response, and its input."""
    if "messages" in fields:
        raise InvalidValue("/v1/responses takes input, not messages.", param="messages")
    read = Conversation()
    if "instructions" in fields:
        read.add({"role": "system", "content": text(fields["instructions"], "instructions")}, "instructions")
    if "previous_response_id" in fields:
        previous = text(fields["previous_response_id"], "previous_response_id")
        for message in history.conversation(previous, "previous_response_id"):
            read.add(_chat_message(message), "previous_response_id")
    _read_input(read, fields, history)
    return read


def _read_input(read: Conversation, fields: Mapping[str, Any], history: History) -> None:
    """Add the messages of the input. A request of a job may call it `prompt`, if it is a text."""
    if isinstance(fields.get("prompt"), dict):
        raise UnsupportedParameter("Prompt templates are not stored here. Send input.", param="prompt")
    if "input" in fields and "prompt" in fields:
        raise InvalidValue("Give either input or prompt, not both.", param="prompt")
    asked = fields.get("input", fields.get("prompt"))
    if asked is None:
        raise MissingParameter("The field input is required.", param="input")
    if isinstance(asked, str):
        read.add({"role": "user", "content": asked}, "input")
    elif isinstance(asked, list) and asked:
        for place, item in _items(asked, history):
            _add_item(read, item, place)
    else:
        raise InvalidValue("must be a text or a list of at least one item", param="input")
    if not any(place.startswith("input") for place in read.places):
        raise InvalidValue("The input has no message.", param="input")


def read_options(fields: Mapping[str, Any]) -> ResponseOptions:
    """Return what the Response object repeats from the body."""
    check_metadata(fields.get("metadata"))
    echo = {name: fields[name] for name in _ECHOED if fields.get(name) not in (None, [], {})}
    for name in _ECHOED_HINTS:
        if isinstance(value := fields.get(name), str) and len(value) <= _MAX_HINT_CHARS and "\0" not in value:
            echo[name] = value
    background = boolean(fields.get("background", False), "background")
    store = boolean(fields.get("store", True), "store")
    if background and not store:
        raise InvalidValue("A background response is stored until it is retrieved. Leave store out.", param="store")
    return ResponseOptions(
        instructions="instructions" in fields,
        previous_response_id=fields.get("previous_response_id"),
        background=background,
        store=store,
        echo=echo,
    )


@contextmanager
def as_given(fields: Mapping[str, Any], endpoint: Endpoint, places: Sequence[str] = ()) -> Iterator[None]:
    """On /v1/responses, rename the field of a RequestRefused from the chat to the field of the body that was sent."""
    try:
        yield
    except RequestRefused as refused:
        if refused.param is not None and endpoint == RESPONSES_ENDPOINT:
            refused.param = _given_name(refused.param, fields, places)
        raise


def _given_name(param: str, fields: Mapping[str, Any], places: Sequence[str]) -> str:
    if found := _FUNCTION_PATH.match(param):
        return found[1] + param[found.end() :]
    if re.split(r"[.\[]", param, maxsplit=1)[0] in fields:
        return param
    found = _MESSAGE.fullmatch(param)
    if found and int(found[1]) < len(places):
        place = places[int(found[1])]
        return place + found[2] if place.endswith("]") else place
    for chat, given in _GIVEN_NAMES.items():
        if param == chat or param.startswith((f"{chat}.", f"{chat}[")):
            return given + param.removeprefix(chat)
    return param


def _truncation(value: Any) -> Json:
    """Return `truncate_prompt_tokens`: of a prompt that is too long, the end that fits is kept."""
    if value not in ("auto", "disabled"):
        raise InvalidValue(f"must be auto or disabled, not {shown(value)}", param="truncation")
    return {"truncate_prompt_tokens": -1} if value == "auto" else {}


def _text(value: Any, chat: Mapping[str, Any]) -> Json:
    """Return `response_format` and `verbosity` for the field `text`."""
    fields = object_fields(value, "text")
    refuse_unknown(fields, {"format", "verbosity"}, "text.")
    found: Json = {"verbosity": fields["verbosity"]} if "verbosity" in fields else {}
    if "format" not in fields:
        return found
    if "response_format" in chat:
        raise InvalidValue("Give either text.format or response_format, not both.", param="response_format")
    form = object_fields(fields["format"], "text.format")
    if form.get("type") == "json_schema" and "json_schema" not in form:
        nested = {name: form.pop(name) for name in _SCHEMA if name in form}
        form["json_schema"] = nested
    return found | {"response_format": form}


def _reasoning(value: Any) -> Any:
    """Return `reasoning` without hints; the reasoning itself is returned, never a summary of it."""
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if name not in _REASONING_HINTS}


def _tools(value: Any) -> Any:
    """Return tools in the form of a chat; values of another kind as they are, for the parser to refuse."""
    if not isinstance(value, list):
        return value
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(value)]


def _tool(value: Any, param: str) -> Any:
    if not isinstance(value, dict) or isinstance(value.get("function"), dict):
        return value
    if value.get("type") != "function":
        raise other_tool(value, param)
    refuse_unknown(value, _FUNCTION_HINTS.union(_FUNCTION), f"{param}.")
    return {"type": "function", "function": {name: value[name] for name in _FUNCTION if value.get(name) is not None}}


def _tool_choice(value: Any) -> Any:
    """Return a tool choice in the form of a chat."""
    if not isinstance(value, dict):
        return value
    match value.get("type"):
        case "function" if "function" not in value:
            return {"type": "function", "function": {"name": value.get("name")}}
        case "allowed_tools" if "allowed_tools" not in value:
            allowed = {"mode": value.get("mode"), "tools": _tools(value.get("tools"))}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case "function" | "allowed_tools":
            return value
    raise other_tool(value, "tool_choice")


def _include(value: Any) -> Sequence[str]:
    if not isinstance(value, list):
        raise InvalidValue(f"must be a list of strings, not {kind(value)}", param="include")
    for index, part in enumerate(value):
        if not isinstance(part, str) or part not in _INCLUDABLE:
            known = ", ".join(sorted(_INCLUDABLE))
            raise InvalidValue(f"must be one of {known}, not {shown(part)}", param=f"include[{index}]")
    return value


def _chat_message(message: ChatMessage) -> Json:
    """Return a stored message in the form of a chat's body."""
    fields = message.model_dump(mode="json", exclude={"tool_calls", "name"})
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.tool_calls
    ]
    return fields | ({"tool_calls": calls} if calls else {})


def _items(asked: Sequence[Any], history: History) -> Iterator[tuple[str, Json]]:
    """Yield the items of the input, each with its place; references are replaced by what they name."""
    references = 0
    for index, item in enumerate(asked):
        place = f"input[{index}]"
        if not isinstance(item, dict):
            raise InvalidValue(f"An item is an object, not {kind(item)}.", param=place)
        if item.get("type") == "item_reference":
            references += 1
            if references > _MAX_REFERENCES:
                raise InvalidValue(f"The input has more than {_MAX_REFERENCES} references.", param=place)
            item = history.item(text(item.get("id"), f"{place}.id"), f"{place}.id")
        yield place, item


def _add_item(read: Conversation, item: Json, place: str) -> None:
    """Add an item of the input to the conversation. Reasoning goes with the answer after it, as templates read it."""
    match item.get("type") or "message":
        case "message":
            message = {name: value for name, value in item.items() if name not in ("type", "status", "phase")}
            read.add(message, place)
        case "function_call":
            _add_call(read, item, place)
        case "function_call_output":
            content = item.get("output")
            read.add({"role": "tool", "tool_call_id": _call_id(item, place), "content": content}, place)
        case "reasoning":
            read.reasoning += _reasoning_text(item)
        case other:
            raise UnsupportedParameter(f"Items of type {shown(other)} are not supported.", param=f"{place}.type")


def _reasoning_text(item: Json) -> str:
    """Return the text of a reasoning item; summaries and encrypted reasoning have none that a model wrote."""
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _add_call(read: Conversation, item: Json, place: str) -> None:
    """Add a call to the assistant's message before it, or as a message of its own."""
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": _call_id(item, place), "type": "function", "function": function}
    last = read.messages[-1] if read.messages else {}
    if last.get("role") == "assistant" and read.places[-1] != "previous_response_id":
        last["tool_calls"] = [*last.get("tool_calls", ()), call]
    else:
        read.add({"role": "assistant", "content": None, "tool_calls": [call]}, place)


def _call_id(item: Json, place: str) -> str:
    return text(item.get("call_id"), f"{place}.call_id")
