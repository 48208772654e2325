"""Chats: from the turns of a conversation to the token ids of the text that the model's chat template makes of them.

Templates are programs that came with the model. Each is tried when it is loaded: with a string, with content parts, for
every role; so it is given what it shows, and a role that it leaves out is refused. Special tokens that are spelt in a
turn's content are text there: only the template writes control tokens.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from functools import cached_property
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, encode_marked_chat, mark_control_tokens

from jobs.errors import InvalidValue

Turn = Mapping[str, str]  # role and content
Special = Literal["text", "control"]  # what a special token spelt in content is

_LEAST_CHARS, _CHARS_A_CHAR = 1_000_000, 10  # that a template may write at most, and for each character of content
_MARK = "7dcb04"  # stands in no template
_ROLES: dict[str, tuple[str, ...]] = {  # conversations in which a role is tried, by the initials of their roles
    "user": ("u", "su", "uau"),
    "system": ("su", "s"),
    "assistant": ("uau", "suau", "ua"),
    "tool": ("uatu", "uat", "utu", "suatu"),
}
_INITIALS = {role[0]: role for role in _ROLES}
_NOTHING = re.compile("(?!)")


class _Form(Enum):
    """How a template takes the content of a role."""

    TEXT = auto()
    PARTS = auto()
    LEFT_OUT = auto()


class Chat:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: Special = "text") -> None:
        """Try the template, if there is one."""
        self._tokenizer = tokenizer
        self._special = special
        self._lock = threading.Lock()
        # One that may be switched to take special tokens for text while others encode with theirs. It takes a while.
        self._own = copy.deepcopy(tokenizer) if self.has_template and special == "text" else tokenizer
        self._forms: dict[str, _Form] = {}
        self.findings: list[str] = []  # what the template can't do, for people
        if self.has_template:
            for role in _ROLES:
                self._forms[role] = self._form_of(role)

    @property
    def has_template(self) -> bool:
        """True where conversations can be rendered."""
        return self._tokenizer.chat_template is not None

    def encode(self, turns: Sequence[Turn], check: Callable[[str], None]) -> list[int]:
        """Return the ids of a rendered conversation, in front of an answer. `check` may refuse the rendered text.

        Raises InvalidValue if there is no template, or if it leaves something out or fails.
        """
        if not self.has_template:
            raise InvalidValue("this model has no chat template; send a prompt to /v1/completions", param="messages")
        for turn in turns:
            if self._forms.get(turn["role"]) is _Form.LEFT_OUT:
                raise InvalidValue(
                    f"the model's chat template leaves out what {turn['role']} messages say; "
                    "put it into a user message",
                    param="messages",
                )
        given = [self._given(turn) for turn in turns]
        text = self._rendered(given)
        check(text)
        spelt = self._spelt(turns) if self._special == "text" else []
        if not spelt:
            return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        marked = mark_control_tokens(given, re.compile("|".join(map(re.escape, sorted(spelt, key=len, reverse=True)))))
        return self._encode_marked(self._rendered(cast(list[dict[str, Any]], marked)))

    def _encode_marked(self, text: str) -> list[int]:
        try:
            with self._lock:
                return list(encode_marked_chat(self._own, text))
        except ValueError as error:
            raise InvalidValue(
                f"the messages spell a special token that this tokenizer can't read as text ({error}); leave it out",
                param="messages",
            ) from error

    def _spelt(self, turns: Sequence[Turn]) -> list[str]:
        """Return the special tokens that the contents spell, also around the marks that are about to be dropped."""
        contents = [mark_control_tokens(turn["content"], _NOTHING) for turn in turns]
        return [special for special in self._specials if any(special in content for content in contents)]

    @cached_property
    def _specials(self) -> list[str]:
        return [added.content for added in self._tokenizer.added_tokens_decoder.values() if added.special]

    def _given(self, turn: Turn, form: _Form | None = None) -> dict[str, Any]:
        """Return a turn in the form that the template takes."""
        parts = (form or self._forms.get(turn["role"], _Form.TEXT)) is _Form.PARTS
        return {**turn, "content": [{"type": "text", "text": turn["content"]}] if parts else turn["content"]}

    def _form_of(self, role: str) -> _Form:
        """Return the form in which the template shows what a role says: text if it can."""
        refusals: list[str] = []
        tries = [(form, initials) for initials in _ROLES[role] for form in (_Form.TEXT, _Form.PARTS)]
        for form, initials in tries:
            try:
                if _MARK in self._rendered([self._tried(_INITIALS[i], role, form) for i in initials]):
                    return form
            except InvalidValue as refused:
                refusals.append(refused.message)
        if len(refusals) == len(tries):  # it says so itself, whenever it is asked
            self.findings.append(f"With a {role} message: {refusals[0]}")
            return _Form.TEXT
        self.findings.append(f"The model's chat template leaves out what {role} messages say; they will be refused")
        return _Form.LEFT_OUT

    def _tried(self, role: str, wanted: str, form: _Form) -> dict[str, Any]:
        if role == wanted:
            return self._given({"role": role, "content": _MARK}, form)
        known = self._forms.get(role)
        return self._given({"role": role, "content": "a"}, form if known in (None, _Form.LEFT_OUT) else known)

    def _rendered(self, turns: list[dict[str, Any]]) -> str:
        """Return what the template writes, piece by piece as it may never end."""
        most = _LEAST_CHARS + _CHARS_A_CHAR * sum(len(str(turn["content"])) for turn in turns)
        pieces: list[str] = []
        length = 0
        try:
            template = _compile_jinja_template(self._tokenizer.get_chat_template())
            special = self._tokenizer.special_tokens_map
            for piece in template.generate(
                messages=turns, tools=None, documents=None, add_generation_prompt=True, **special
            ):
                pieces.append(piece)
                length += len(piece) + 1
                if length > most:
                    raise OverflowError(f"it writes more than {most} characters")
        except Exception as error:  # a template is a program: it may raise anything
            kind = "" if error.__class__.__module__.startswith("jinja2") else f"{type(error).__name__}: "
            raise InvalidValue(
                f"the model's chat template refuses these messages: {kind}{error}", param="messages"
            ) from error
        return "".join(pieces)
