"""How families of models write tool calls: one table for the grammar, the parser and the prompt.

A call is a name and JSON arguments between fixed texts. The family of a model is read from the text of its chat
template. A template of no known family is not given tools: its model gets Hermes' form in a system message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class CallFormat:
    """The texts around names and arguments. Special tokens are spelt in them."""

    name: str
    trigger: str  # in free text it begins a call; the start of `first`
    first: str  # before the name of the first call
    arguments: str  # between name and arguments
    after: str  # after the arguments
    next: str | None  # before the name of each later call; None: one call per answer
    last: str = ""  # after the last call
    at_start: bool = False  # a call begins the answer, or there is none
    opening: str = ""  # may precede a call that begins the answer
    signs: tuple[str, ...] = ()  # all of them are in a template of the family
    foreign: tuple[str, ...] = ()  # none of them is

    @property
    def text(self) -> str:
        """All fixed texts together."""
        return "".join((self.opening, self.first, self.arguments, self.after, self.next or "", self.last))

    def call(self, name: str, arguments: str) -> str:
        """Return the text of one call."""
        return f"{self.first}{name}{self.arguments}{arguments}{self.after}{self.last}"

    def calls(self, calls: list[tuple[str, str]]) -> str:
        """Return the text of calls, each a name and its arguments as JSON."""
        between = self.next or self.first
        written = between.join(f"{name}{self.arguments}{arguments}{self.after}" for name, arguments in calls)
        return f"{self.first}{written}{self.last}" if calls else ""


_TOOL_CALLS_BEGIN: Final = "<｜tool▁calls▁begin｜>"
_TOOL_CALL_BEGIN: Final = "<｜tool▁call▁begin｜>"
_TOOL_CALL_END: Final = "<｜tool▁call▁end｜>"
_TOOL_CALLS_END: Final = "<｜tool▁calls▁end｜>"
_TOOL_SEP: Final = "<｜tool▁sep｜>"
_NAME: Final = '{"name": "'
_ARGUMENTS: Final = '", "arguments": '


def _deepseek(
    name: str, kind: str, fence: tuple[str, str], between: str, signs: tuple[str, ...], foreign: tuple[str, ...] = ()
) -> CallFormat:
    begin = f"{_TOOL_CALL_BEGIN}{kind}"
    return CallFormat(
        name=name,
        trigger=_TOOL_CALLS_BEGIN,
        first=f"{_TOOL_CALLS_BEGIN}{begin}",
        arguments=fence[0],
        after=f"{fence[1]}{_TOOL_CALL_END}",
        next=f"{between}{begin}",
        last=_TOOL_CALLS_END,
        signs=(_TOOL_CALLS_BEGIN, *signs),
        foreign=foreign,
    )


def _mistral_list(name: str, space: str, signs: tuple[str, ...], foreign: tuple[str, ...]) -> CallFormat:
    """Return the format of a JSON list of calls after one token."""
    return CallFormat(
        name=name,
        trigger="[TOOL_CALLS]",
        first=f"[TOOL_CALLS]{space}[{_NAME}",
        arguments=_ARGUMENTS,
        after="}",
        next=f", {_NAME}",
        last="]",
        signs=signs,
        foreign=foreign,
    )


HERMES: Final = CallFormat(
    name="hermes",
    trigger="<tool_call>",
    first=f"<tool_call>\n{_NAME}",
    arguments=_ARGUMENTS,
    after="}\n</tool_call>",
    next=f"\n<tool_call>\n{_NAME}",
    signs=("<tool_call>",),
    foreign=("<function=", "<arg_key>", "<|tool_call>"),  # calls that are not JSON
)
CALL_FORMATS: Final = (
    _deepseek("deepseek_v3", f"function{_TOOL_SEP}", ("\n```json\n", "\n```"), "\n", ("```json",)),
    _deepseek("deepseek_v31", "", (_TOOL_SEP, ""), "", (), foreign=("```json",)),
    CallFormat(
        name="mistral_args",
        trigger="[TOOL_CALLS]",
        first="[TOOL_CALLS]",
        arguments="[ARGS]",
        after="",
        next="[TOOL_CALLS]",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        foreign=("[CALL_ID]",),
    ),
    _mistral_list("mistral", " ", ("[TOOL_CALLS] [",), ("[ARGS]",)),
    _mistral_list("mistral_tekken", "", ("[TOOL_CALLS]",), ("[ARGS]", "[TOOL_CALLS] [")),
    HERMES,
    CallFormat(
        name="llama3",
        trigger=_NAME,
        first=_NAME,
        arguments='", "parameters": ',
        after="}",
        next=None,
        at_start=True,
        opening="<|python_tag|>",
        signs=('"parameters": ', "ipython"),
        foreign=("<tool_call>",),
    ),
)
_BY_NAME: Final = {form.name: form for form in CALL_FORMATS}


def call_format(name: str) -> CallFormat:
    """Return the format with this name; raise KeyError for one that this version does not know."""
    return _BY_NAME[name]


def detect(template: str) -> CallFormat | None:
    """Return the format of a chat template, from its text; None if it is of no known family."""
    for form in CALL_FORMATS:
        if all(sign in template for sign in form.signs) and not any(sign in template for sign in form.foreign):
            return form
    return None
