"""Reasoning of a model: its markers, found in its own chat template, and the tokens that a text spends on it.

The marker pairs are those of published chat templates. A template that has the end marker of a pair marks its reasoning
so. Whether the prompt has opened the reasoning is read from the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedTokenizerFast

from jobs.errors import InvalidValue, RequestFailed
from jobs.messages import AnswerFormat, GenerationRequest, ReasoningFormat, ReasoningOptions
from jobs.openai.answers import ReasoningSplitter

Markers = tuple[str, str]  # start, end

# By the names of vLLM's reasoning parsers. Auto takes the first pair whose end marker the template has.
MARKERS: Final[Mapping[str, Markers]] = MappingProxyType(
    {
        "deepseek_r1": ("<think>", "</think>"),  # and Qwen3, QwQ, GLM-4.5, DeepSeek V3.1, MiniMax M2, SmolLM3, …
        "mistral": ("[THINK]", "[/THINK]"),
        "seed_oss": ("<seed:think>", "</seed:think>"),
        "kimi": ("◁think▷", "◁/think▷"),
        "exaone": ("<thought>", "</thought>"),
    }
)
_SAME: Final = ("qwen3", "deepseek_v3", "glm45", "qwq", "minimax_m2", "olmo3", "step3", "ernie45")
AUTO: Final = "auto"
OFF: Final = "off"
_SWITCHES: Final = ("enable_thinking", "thinking")  # arguments of chat templates that switch the reasoning on or off
_TAIL_TOKENS: Final = 32  # of a prompt; a start marker and line breaks have fewer


def markers_of(template: str | None, named: str = AUTO) -> Markers | None:
    """Return the reasoning markers of a model; None: its text is not split. `named` is BASIC_REASONING_PARSER."""
    if named == OFF or template is None:
        return None
    if named != AUTO:
        return MARKERS["deepseek_r1" if named in _SAME else named]
    return next((pair for pair in MARKERS.values() if pair[1] in template), None)


def template_arguments(request: GenerationRequest, variables: Collection[str]) -> dict[str, Any]:
    """Return the arguments of a request for a chat template that reads these variables.

    The reasoning is switched by the names that the template reads. `chat_template_kwargs` come as they are.
    """
    wanted = request.reasoning or ReasoningOptions()
    switches = dict.fromkeys(_SWITCHES, wanted.enabled) if wanted.enabled is not None else {}
    effort = {"reasoning_effort": wanted.effort} if wanted.effort is not None else {}
    read = {name: value for name, value in {**switches, **effort}.items() if name in variables}
    return read | (request.chat_template_kwargs or {})


def is_begun_by_model(after_user: Callable[[Mapping[str, Any]], str], markers: Markers) -> bool:
    """Return whether the model writes the start marker itself, unless its template is told not to (Qwen3, GLM-4.5).

    Such a template closes an empty reasoning when it is switched off, and writes no marker otherwise. `after_user` is
    what it writes after a user's message, for these arguments.
    """
    switched_off = after_user(dict.fromkeys(_SWITCHES, False)).rstrip()
    return switched_off.endswith(markers[1]) and not after_user({}).rstrip().endswith(markers)


@dataclass(frozen=True)
class Reasoning:
    """The markers of one tokenizer's model."""

    tokenizer: PreTrainedTokenizerFast
    markers: Markers
    begun_by_model: bool = False

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of markers that are special tokens: the text must show them although it shows no others."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, token in added if token.special and token.content in self.markers)

    def format(self, prompt: Sequence[int], options: ReasoningOptions | None) -> ReasoningFormat:
        """Return how the text after a prompt marks its reasoning. Raises InvalidValue if it can't be switched off."""
        wanted = options or ReasoningOptions()
        start, end = self.markers
        opened = self._tail(prompt).endswith(start)
        if opened and wanted.enabled is False:
            raise InvalidValue(
                "the model's chat template can't switch its reasoning off; leave out enable_thinking: false and what "
                "means the same, and set include_reasoning to false for answers without it",
                param="enable_thinking",
            )
        return ReasoningFormat(start=start, end=end, opened=opened, included=wanted.included, separate=wanted.separate)

    def opening(self, prompt: Sequence[int]) -> list[int]:
        """Return the token ids that open the reasoning after a prompt, where the model would begin it itself.

        A grammar binds the content only, so where it begins must not depend on whether the model reasons.
        """
        if not self.begun_by_model or self._tail(prompt).endswith(self.markers):
            return []
        return list(self.tokenizer.backend_tokenizer.encode(f"{self.markers[0]}\n", add_special_tokens=False).ids)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The token id of the end marker; none if it has more than one token."""
        found = self.tokenizer.backend_tokenizer.token_to_id(self.markers[1])
        return () if found is None else (found,)

    def _tail(self, prompt: Sequence[int]) -> str:
        """Return the end of a prompt, special tokens by name, without the white space after it."""
        ids = list(prompt[-_TAIL_TOKENS:])
        return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)).rstrip()


class ReasoningCounter:
    """Counts the tokens of a text that are reasoning: all up to the one that completes the end marker."""

    def __init__(self, form: AnswerFormat | None, end_ids: Sequence[int] = ()) -> None:
        """Count the tokens of a text with this format, whose grammar begins after `end_ids`."""
        reasoning = None if form is None else form.reasoning
        self._splitter = None if reasoning is None else ReasoningSplitter(reasoning)
        self._end_ids = end_ids
        self._num_open = 0  # tokens until the reasoning ended, or turned out to be none

    @property
    def count(self) -> int | None:
        """Tokens of the reasoning so far; None if the format has none."""
        if self._splitter is None:
            return None
        return self._num_open if self._splitter.found else 0

    def end(self) -> None:
        """End the text. Raises RequestFailed if its grammar has not begun: there is no content to be bound."""
        if self._end_ids and self._splitter is not None and self._splitter.open:
            raise RequestFailed("the model ended its text within the reasoning, before the content of the grammar")

    def push(self, token: int, text: str) -> None:
        """Add a token with its text, empty for one that shows none.

        Raises RequestFailed if another token than that of the grammar ends the reasoning: the content is not bound.
        """
        was_open = self._splitter is not None and self._splitter.open
        if self._splitter is None or not was_open:
            return
        self._num_open += 1
        self._splitter.push(text)
        if self._end_ids and not self._splitter.open and token not in self._end_ids:
            raise RequestFailed("the model spelled out the end of its reasoning, after which the grammar did not begin")
