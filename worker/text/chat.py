"""Render conversations with the model's chat template and tokenize the result.

A template is a program that comes with the model. Each is probed at load time, with string content and with content
parts, for every role: messages get the content format that it shows, and a role that it drops is refused. Special
tokens in a message's content are read as text: only the template writes control tokens.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, cast

from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, encode_marked_chat, mark_control_tokens

from jobs.errors import InvalidValue
from worker.text.tool_prompt import ToolPrompt

Message = Mapping[str, Any]  # with role and content; of an answer maybe reasoning_content and tool_calls
Special = Literal["text", "control"]  # how a special token in content is read

_BASE_CHARS = 1_000_000  # max length of a rendered text, plus:
_CHARS_PER_CHAR = 10  # for each character of content
_PROBE_TEXT = "7dcb04"  # content of a probe; occurs in no template
_PROBES: dict[str, tuple[str, ...]] = {  # conversations that probe a role, as initials of their roles
    "user": ("u", "su", "uau"),
    "system": ("su", "s"),
    "assistant": ("uau", "suau", "ua"),
    "tool": ("uatu", "uat", "utu", "suatu"),
}
_INITIALS = {role[0]: role for role in _PROBES}
_NEVER = re.compile("(?!)")
_ESCAPED_MARK = re.compile(r"\\U000f000[01]|\\udb80\\udc0[01]", re.IGNORECASE)  # of transformers' marks
_OPTIONAL = ("reasoning_content",)  # fields of messages that templates may read
_END = "7dcb04end "  # marks where the last message ends; without its space, the template trims contents


class _ContentFormat(Enum):
    """How a template takes the content of a role's messages."""

    TEXT = auto()
    PARTS = auto()
    DROPPED = auto()


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation is rendered and tokenized."""

    add_generation_prompt: bool = True  # begin an answer after the last message
    continue_final_message: bool = False  # leave the last message open instead
    add_special_tokens: bool = False  # those of the tokenizer, around what the template writes


class Chat:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: Special = "text") -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._lock = threading.Lock()
        # A copy that can be switched to read special tokens as text while other threads use the original. Slow to make.
        self._text_tokenizer = copy.deepcopy(tokenizer) if self.has_template and special == "text" else tokenizer
        self._formats: dict[str, _ContentFormat] = {}
        self._untaken: set[str] = set()  # roles that the template drops or refuses
        self.findings: list[str] = []  # what the template can't do, as sentences for the log
        if self.has_template:
            for role in _PROBES:
                self._formats[role] = self._detect_format(role)

    @property
    def has_template(self) -> bool:
        """True if the tokenizer has a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def template(self) -> str | None:
        """The source of the template; None if there is none that can be read."""
        if not self.has_template:
            return None
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError:  # several templates and no default: rendering reports it
            return None

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads from its arguments; none of a template that can't be compiled."""
        try:
            source = self._tokenizer.get_chat_template()
            return frozenset(find_undeclared_variables(_compile_jinja_template(source).environment.parse(source)))
        except Exception:  # rendering reports it, to each request
            return frozenset()

    def after_user(self, arguments: Mapping[str, Any] = MappingProxyType({})) -> str:
        """Return what the template writes after a user's message; nothing if it refuses the arguments."""
        try:
            text = self._render([self._formatted({"role": "user", "content": _PROBE_TEXT})], arguments)
        except InvalidValue:
            return ""
        return text.rpartition(_PROBE_TEXT)[2]

    @cached_property
    def tools(self) -> ToolPrompt:
        """How the template takes tools and calls; probed at the first use."""
        takes_system = "system" not in self._untaken and self._formats.get("system") is not _ContentFormat.DROPPED
        try:
            template = str(self._tokenizer.get_chat_template(tools=[{}]))
        except ValueError:  # there is none
            template = ""
        return ToolPrompt(template, self._rendered, takes_system=takes_system)

    def _rendered(self, turns: Sequence[Message], tools: Sequence[Message] | None) -> str:
        return self._render([self._formatted(turn) for turn in turns], tools=tools)

    def encode(
        self,
        messages: Sequence[Message],
        check: Callable[[str], None],
        arguments: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: ChatOptions = ChatOptions(),
    ) -> list[int]:
        """Return the token ids of a rendered conversation, up to where the answer starts.

        The template gets `tools` and the `arguments` too. `check` may refuse the rendered text by raising. Raises
        InvalidValue if there is no template, if it drops a role of the conversation, if it changes the message to
        continue, or if it fails.
        """
        if not self.has_template:
            raise InvalidValue("this model has no chat template; send a prompt to /v1/completions", param="messages")
        # An empty message says nothing: leave it out where its role would be refused.
        last = messages[-1] if options.continue_final_message else None
        messages = [m for m in messages if _says(m) or m["role"] not in self._untaken or m is last]
        for message in messages:
            if self._formats.get(message["role"]) is _ContentFormat.DROPPED and not _is_of_call(message):
                raise InvalidValue(
                    f"the model's chat template drops {message['role']} messages; "
                    "put their content into a user message",
                    param="messages",
                )
        formatted = [self._formatted(message) for message in messages]
        if tools is not None or any(map(_is_of_call, messages)):
            self._refuse_names([messages, tools])
        text = self._opened(formatted, arguments, tools, options)
        check(text)
        special = self._special_in([*messages, arguments, *(tools or ())]) if self._special == "text" else []
        if special:
            longest_first = sorted(special, key=len, reverse=True)
            control = re.compile("|".join(map(re.escape, longest_first)))
            marked = cast(list[dict[str, Any]], mark_control_tokens(formatted, control))
            others = mark_control_tokens(dict(arguments), control), mark_control_tokens(tools, control)
            ids = self._encode_marked(self._opened(marked, *others, options))
        else:
            ids = list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        before, after = self._special_around if options.add_special_tokens else ((), ())
        return [*before, *ids, *after]

    def _refuse_names(self, given: Sequence[Any]) -> None:
        """Refuse special tokens in the names of fields, which can't be marked."""
        found = [token for token in self._special_tokens for value in given for name in _names(value) if token in name]
        if found:
            raise InvalidValue(f"a name in the tools or calls contains the special token {found[0]}", param="tools")

    def _encode_marked(self, text: str) -> list[int]:
        if _ESCAPED_MARK.search(text):
            raise InvalidValue(
                "the chat template escapes special tokens in the messages; remove them", param="messages"
            )
        try:
            with self._lock:
                return list(encode_marked_chat(self._text_tokenizer, text))
        except ValueError as error:
            raise InvalidValue(
                f"the messages contain a special token that this tokenizer can't read as text ({error}); remove it",
                param="messages",
            ) from error

    def _special_in(self, given: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the special tokens that occur in the given texts, also across the marks that are removed."""
        contents = [mark_control_tokens(text, _NEVER) for values in given for text in _texts(values)]
        return [special for special in self._special_tokens if any(special in content for content in contents)]

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [added.content for added in self._tokenizer.added_tokens_decoder.values() if added.special]

    @cached_property
    def _special_around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer adds before and after a text."""
        encode = self._tokenizer.backend_tokenizer.encode
        bare, whole = (encode(_PROBE_TEXT, add_special_tokens=added).ids for added in (False, True))
        first = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        return whole[:first], whole[first + len(bare) :]

    def _formatted(self, message: Message, fmt: _ContentFormat | None = None) -> dict[str, Any]:
        """Return a message in the content format that the template takes."""
        parts = (fmt or self._formats.get(message["role"], _ContentFormat.TEXT)) is _ContentFormat.PARTS
        message = {name: value for name, value in message.items() if name not in self._unread}
        parts = parts and message["content"] is not None
        return {**message, "content": [{"type": "text", "text": message["content"]}] if parts else message["content"]}

    def _detect_format(self, role: str) -> _ContentFormat:
        """Return the format in which the template shows a role's content: text if possible."""
        refusals: list[str] = []
        probes = [(fmt, initials) for initials in _PROBES[role] for fmt in (_ContentFormat.TEXT, _ContentFormat.PARTS)]
        for fmt, initials in probes:
            try:
                if _PROBE_TEXT in self._render([self._probe_message(_INITIALS[i], role, fmt) for i in initials]):
                    return fmt
            except InvalidValue as refused:
                refusals.append(refused.message)
        if role != "user":
            self._untaken.add(role)
        if len(refusals) == len(probes):  # every request with this role gets the template's own error
            self.findings.append(f"With a {role} message: {refusals[0]}")
            return _ContentFormat.TEXT
        self.findings.append(f"The model's chat template drops {role} messages; they will be refused")
        return _ContentFormat.DROPPED

    def _probe_message(self, role: str, wanted: str, fmt: _ContentFormat) -> dict[str, Any]:
        if role == wanted:
            return self._formatted({"role": role, "content": _PROBE_TEXT}, fmt)
        detected = self._formats.get(role)
        return self._formatted(
            {"role": role, "content": "a"}, fmt if detected in (None, _ContentFormat.DROPPED) else detected
        )

    @cached_property
    def _unread(self) -> frozenset[str]:
        """The optional fields of messages that the template does not read: one that shows whole messages lacks them."""
        return frozenset(name for name in _OPTIONAL if name not in (self.template or ""))

    def _opened(
        self,
        messages: list[dict[str, Any]],
        arguments: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
        options: ChatOptions,
    ) -> str:
        """Return the rendered text; with `continue_final_message`, up to the end of the last message's content."""
        if not options.continue_final_message:
            return self._render(messages, arguments, tools, add_generation_prompt=options.add_generation_prompt)
        content = _text_of(messages[-1])
        end = _END
        while any(end.strip() in _text_of(message) for message in messages):
            end = "x" + end
        opened_messages = [*messages[:-1], _with_text(messages[-1], content + end)]
        text = self._render(opened_messages, arguments, tools, add_generation_prompt=False)
        at = text.rfind(end.strip())
        opened = text[: max(at, 0)].replace(end, "").replace(end.strip(), "")  # a template may show a content twice
        if not text.startswith(end, max(at, 0)):  # the template trims contents, and so the end of this one
            opened = opened.removesuffix(content[len(content.rstrip()) :])
        if at < 0 or not opened.rstrip().endswith(content.strip()):
            raise InvalidValue(
                "the model's chat template changes the last message, so that it can't be continued; end with a user "
                "message, or send the rendered text to /v1/completions",
                param="messages",
            )
        return opened

    def _render(
        self,
        messages: list[dict[str, Any]],
        arguments: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the rendered text. Rendered piece by piece with a limit, because a template may never end."""
        given = sum(len(text) for values in (*messages, arguments, *(tools or ())) for text in _texts(values))
        max_chars = _BASE_CHARS + _CHARS_PER_CHAR * given
        pieces: list[str] = []
        length = 0
        try:
            template = _compile_jinja_template(self._tokenizer.get_chat_template(tools=_listed(tools)))
            special = self._tokenizer.special_tokens_map
            own = {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **special,
            }
            for piece in template.generate(**{**arguments, **own}):
                pieces.append(piece)
                length += len(piece) + 1
                if length > max_chars:
                    raise OverflowError(f"it writes more than {max_chars} characters")
        except Exception as error:  # a template is a program: it may raise anything
            kind = "" if error.__class__.__module__.startswith("jinja2") else f"{type(error).__name__}: "
            raise InvalidValue(
                f"the model's chat template refuses these messages: {kind}{error}", param="messages"
            ) from error
        return "".join(pieces)


def _is_of_call(message: Message) -> bool:
    """Return whether a message makes calls or answers one."""
    return bool(message.get("tool_calls")) or "tool_call_id" in message


def _says(message: Message) -> bool:
    return bool(message["content"]) or _is_of_call(message)


def _listed(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[Any, Any]] | None:
    return None if tools is None else [dict(tool) for tool in tools]


def _names(value: Any) -> Iterator[str]:
    """Yield the names of fields in a value of any depth."""
    if isinstance(value, Mapping):
        yield from map(str, value)
        yield from (name for inner in value.values() for name in _names(inner))
    elif isinstance(value, list | tuple):
        yield from (name for inner in value for name in _names(inner))


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value of any depth, without the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in _texts(inner))
    elif isinstance(value, list | tuple):
        yield from (text for inner in value for text in _texts(inner))


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return str(content if isinstance(content, str) else content[0]["text"])


def _with_text(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    parts = not isinstance(message["content"], str)
    return {**message, "content": [{"type": "text", "text": text}] if parts else text}
