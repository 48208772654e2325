"""Parse the prompt of a request: one text, texts or token ids of a completion, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, get_args

from jobs.errors import InvalidValue, MissingParameter, PromptTooLong, UnsupportedParameter
from jobs.messages import COMPLETIONS_ENDPOINT, ChatMessage, Endpoint
from jobs.submission.fields import Treatment, message_field
from jobs.submission.tool_messages import CallHistory
from jobs.submission.values import boolean, kind, shown, text

_ROLES: Final = {role: role for role in get_args(ChatMessage.model_fields["role"].annotation)} | {"developer": "system"}
_NULL_IS_EMPTY: Final = frozenset({"system", "developer", "assistant"})  # their content may be null
# Types of content parts, and the field that holds the text. Parts of the Responses API occur in histories.
_PARTS: Final = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_DROPPED_PARTS: Final = frozenset({"thinking", "redacted_thinking", "reasoning"})


def read_prompt(fields: Mapping[str, Any], endpoint: Endpoint, max_chars: int) -> dict[str, Any]:
    """Return `messages`, `prompt` or `prompts` of the stored request; raise RequestRefused for an invalid prompt."""
    if "messages" in fields and "prompt" in fields:
        raise InvalidValue("Give either prompt or messages, not both.", param="messages")
    if "messages" in fields:
        return {"messages": _messages(fields["messages"], endpoint, max_chars)}
    if "prompt" not in fields:
        raise MissingParameter("A request needs a prompt or messages.", param="prompt")
    if isinstance(fields["prompt"], list) and endpoint == COMPLETIONS_ENDPOINT:
        return {"prompts": _prompts(fields["prompt"], max_chars)}
    prompt = _filled(text(fields["prompt"], "prompt"), "prompt")
    _refuse_long(len(prompt), max_chars, "prompt")
    return {"prompt": prompt}


def _prompts(prompt: list[Any], max_chars: int) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts of a list of texts, of token ids (one prompt), or of lists of token ids."""
    listed = [prompt] if all(type(part) is int for part in prompt) else prompt
    read = tuple(_one_prompt(part, f"prompt[{n}]") for n, part in enumerate(listed))
    _refuse_long(sum(len(part) for part in read), max_chars, "prompt")
    return read


def _one_prompt(prompt: Any, param: str) -> str | tuple[int, ...]:
    if not isinstance(prompt, list):
        return _filled(text(prompt, param), param)
    if not prompt or not all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        raise InvalidValue("must be a text or a list of at least one token id", param=param)
    return tuple(prompt)


def _messages(messages: Any, endpoint: Endpoint, max_chars: int) -> tuple[ChatMessage, ...]:
    if endpoint == COMPLETIONS_ENDPOINT:
        raise InvalidValue(f"{COMPLETIONS_ENDPOINT} takes a prompt, not messages.", param="messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidValue("messages must be a list of at least one message.", param="messages")
    history = CallHistory()
    read = tuple(_message(message, f"messages[{n}]", history) for n, message in enumerate(messages))
    for n, message in enumerate(messages):
        _check_prefix(message, f"messages[{n}].prefix", is_last=n == len(messages) - 1)
    _refuse_long(sum(map(message_chars, read)), max_chars, "messages")
    return read


def message_chars(message: ChatMessage) -> int:
    """Return the number of characters of a message that its template may show."""
    calls = sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return len(message.content) + len(message.reasoning_content or "") + calls


def is_prefill(fields: Mapping[str, Any]) -> bool:
    """Return whether the last of valid messages has `prefix`: DeepSeek's and Mistral's form of a prefill."""
    return bool("messages" in fields and fields["messages"][-1].get("prefix"))


def _check_prefix(message: Mapping[str, Any], param: str, *, is_last: bool) -> None:
    prefix = message.get("prefix")
    if prefix is not None and boolean(prefix, param) and not (is_last and message["role"] == "assistant"):
        raise InvalidValue("Only the last message can be a prefix, and only an assistant's.", param=param)


def _message(message: Any, param: str, history: CallHistory) -> ChatMessage:
    if not isinstance(message, dict):
        raise InvalidValue(f"A message is an object with role and content, not {kind(message)}.", param=param)
    for name, value in message.items():
        field = message_field(name)
        if field.treatment is Treatment.REFUSED and not field.is_idle(value):
            raise UnsupportedParameter(field.meaning, param=f"{param}.{name}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidValue(f"must be one of {', '.join(_ROLES)}, not {shown(role)}", param=f"{param}.role")
    content = message.get("content", "" if role == "assistant" else None)  # answers may leave it out
    if content is None and "content" in message and role in _NULL_IS_EMPTY:
        content = ""
    return ChatMessage(
        role=_ROLES[role],
        content=_content(content, f"{param}.content"),
        **_called(message, param, history),
        reasoning_content=_reasoning(message, param) if role == "assistant" else None,
    )


def _called(message: Mapping[str, Any], param: str, history: CallHistory) -> dict[str, Any]:
    """Return the fields of a message that makes calls, or answers one."""
    if message.get("tool_calls"):
        if message["role"] != "assistant":
            raise InvalidValue("Only assistant messages have calls.", param=f"{param}.tool_calls")
        return {"tool_calls": history.calls(message["tool_calls"], f"{param}.tool_calls")}
    return history.answer(message, param) if message["role"] == "tool" else {}


def _reasoning(message: Mapping[str, Any], param: str) -> str | None:
    """Return the reasoning of an answer in the history, None without one; other forms of it are dropped."""
    given = {name: message[name] for name in ("reasoning_content", "reasoning") if message.get(name)}
    return next((text(value, f"{param}.{name}") for name, value in given.items() if isinstance(value, str)), None)


def _content(content: Any, param: str) -> str:
    """Return the text of a message: a string, or a list of text parts, joined."""
    if not isinstance(content, list):
        return text(content, param)
    return "".join(_part(part, f"{param}[{n}]") for n, part in enumerate(content))


def _part(part: Any, param: str) -> str:
    """Return the text of a part: a string, or an object that names its type."""
    if isinstance(part, str):
        return text(part, param)
    named = part.get("type", "text") if isinstance(part, dict) else part
    if isinstance(part, dict) and isinstance(named, str):
        if named in _DROPPED_PARTS:
            return ""
        if named in _PARTS:
            return text(part.get(_PARTS[named]), f"{param}.{_PARTS[named]}")
    raise UnsupportedParameter(f"Only parts of type text are supported, not {shown(named)}.", param=param)


def _filled(prompt: str, param: str) -> str:
    if not prompt.strip():
        raise InvalidValue("The text is empty.", param=param)
    return prompt


def _refuse_long(chars: int, max_chars: int, param: str) -> None:
    if chars > max_chars:
        raise PromptTooLong(f"The prompt has {chars} characters; the limit is {max_chars}.", param=param)
