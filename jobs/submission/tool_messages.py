"""Parse the calls of a conversation's history: those of assistant messages, and the tool messages that answer them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from jobs.errors import InvalidValue, MissingParameter
from jobs.messages import ToolCall
from jobs.submission.values import kind, shown, text

_MAX_ID_CHARS: Final = 256


class CallHistory:
    """The calls so far, in the order of the messages."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # call id -> function
        self._open: list[str] = []  # ids of calls without an answer

    def calls(self, calls: Any, param: str) -> tuple[ToolCall, ...]:
        """Return the calls of an assistant message; raise RequestRefused for invalid ones."""
        if not isinstance(calls, list):
            raise InvalidValue(f"must be a list of calls, not {kind(calls)}", param=param)
        read = tuple(_call(call, f"{param}[{n}]") for n, call in enumerate(calls))
        self._names |= {call.id: call.name for call in read}
        self._open += [call.id for call in read]
        return read

    def answer(self, message: Mapping[str, Any], param: str) -> dict[str, str]:
        """Return `tool_call_id` and `name` of a tool message.

        One without an id answers the first call that has no answer; without any call it is a message like others.
        """
        given = message.get("tool_call_id")
        if given is not None and given not in self._names:
            raise InvalidValue(
                f"no earlier assistant message has a call with the id {shown(given)}", param=f"{param}.tool_call_id"
            )
        answered = given if given is not None else next(iter(self._open), None)
        if answered is None:
            return {}
        if answered in self._open:
            self._open.remove(answered)
        return {"tool_call_id": answered, "name": self._names[answered]}


def _call(call: Any, param: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or call.get("type", "function") != "function" or not isinstance(function, dict):
        raise InvalidValue("must be a call of a function: an object with id, type and function", param=param)
    identity = text(call.get("id"), f"{param}.id")
    if not 1 <= len(identity) <= _MAX_ID_CHARS:
        raise InvalidValue(f"must have 1 to {_MAX_ID_CHARS} characters", param=f"{param}.id")
    name = text(function.get("name"), f"{param}.function.name")
    if not name:
        raise MissingParameter("The name of the function is required.", param=f"{param}.function.name")
    return ToolCall(
        id=identity, name=name, arguments=_arguments(function.get("arguments"), f"{param}.function.arguments")
    )


def _arguments(arguments: Any, param: str) -> str:
    """Return arguments as JSON text: an object, written as text or as it is. Empty ones are none."""
    if isinstance(arguments, dict):
        return text(json.dumps(arguments, ensure_ascii=False), param)
    written = text("" if arguments is None else arguments, param).strip() or "{}"
    try:
        read = json.loads(written)
    except (ValueError, RecursionError) as exc:
        raise InvalidValue(f"must be a JSON object, as text: {exc}", param=param) from exc
    if not isinstance(read, dict):
        raise InvalidValue(f"must be a JSON object, as text, not {kind(read)}", param=param)
    return written
