"""Convert prompts to token ids and sequences, and token ids back to text.

Checks the limits of the context and the vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from jobs.errors import InvalidValue, PromptTooLong
from jobs.grammar.compiler import grammar_text
from jobs.messages import (
    COMPLETIONS_ENDPOINT,
    RESPONSES_ENDPOINT,
    AnswerFormat,
    CallAnswer,
    ChatMessage,
    GenerationRequest,
    SamplingParameters,
)
from jobs.openai.call_formats import call_format
from worker.engine.errors import ModelRefused, error_summary
from worker.engine.grammar.grammar import Grammar
from worker.engine.sampling.parameters import Sampling, noise_key
from worker.engine.sequence import Sequence as EngineSequence
from worker.text.call_grammar import CallGrammar, after_reasoning
from worker.text.chat import Chat, ChatOptions, Special
from worker.text.prompt_length import PromptLength
from worker.text.reasoning import AUTO, Reasoning, is_begun_by_model, markers_of, template_arguments
from worker.text.text_stream import TextStream

_MIN_DIVISOR = 1e-20  # smallest divisor of logits: float32 rounds smaller ones to 0, and the quotients would be NaN


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """All that another process needs to load the same codec."""

    path: str  # of the tokenizer
    eos_ids: frozenset[int]
    context_tokens: int
    vocabulary: int
    special_in_content: Special
    reasoning_parser: str
    sampling_defaults: Mapping[str, Any]
    long_text_tokens: int | None

    def load(self) -> Codec:
        """Load the tokenizer. Raises ModelRefused."""
        limits = (self.eos_ids, self.context_tokens, self.vocabulary)
        modes = (self.special_in_content, self.reasoning_parser, self.sampling_defaults)
        return Codec(load_tokenizer(self.path), *limits, *modes, self.long_text_tokens)


@dataclass(frozen=True, slots=True)
class Codec:
    """Convert requests to sequences, and sequences to text, for one target model."""

    tokenizer: PreTrainedTokenizerFast
    eos_ids: frozenset[int]
    context_tokens: int  # prompt and completion together
    vocabulary: int  # number of token ids of the target
    special_in_content: Special = "text"  # how special tokens in chat content are read
    reasoning_parser: str = AUTO  # worker.text.reasoning
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)  # worker.text.generation_config
    long_text_tokens: int | None = None  # texts that may have more have the long factors of longrope
    _reasoning: Reasoning | None = field(init=False, repr=False, compare=False)
    _chat: Chat = field(init=False, repr=False, compare=False)
    _length: PromptLength = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Inspect the tokenizer and probe its chat template."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # tokenizer.json may turn it on
        backend.no_padding()
        object.__setattr__(self, "_chat", Chat(self.tokenizer, self.special_in_content))
        object.__setattr__(self, "_length", PromptLength(self.tokenizer))
        markers = markers_of(self._chat.template, self.reasoning_parser)
        if markers is None:
            object.__setattr__(self, "_reasoning", None)
        else:
            begun_by_model = is_begun_by_model(self._chat.after_user, markers)
            object.__setattr__(self, "_reasoning", Reasoning(self.tokenizer, markers, begun_by_model))

    @property
    def options(self) -> CodecOptions:
        """What another process needs to load the same codec; the tokenizer must have been loaded from a path."""
        limits = (self.eos_ids, self.context_tokens, self.vocabulary)
        modes = (self.special_in_content, self.reasoning_parser, dict(self.sampling_defaults))
        return CodecOptions(self.tokenizer.name_or_path, *limits, *modes, self.long_text_tokens)

    @property
    def findings(self) -> list[str]:
        """What the chat template can't do, as sentences for the log."""
        return self._chat.findings

    def encode(self, request: GenerationRequest, endpoint: str) -> list[int]:
        """Return the prompt's token ids. Raises PromptTooLong, or InvalidValue if the chat template refuses it."""
        return self._checked(self._encode(request, endpoint), _prompt_field(request, endpoint), request.sampling)

    def encode_all(self, request: GenerationRequest, endpoint: str) -> list[list[int]]:
        """Return the token ids of all prompts of a request; raises like `encode`."""
        if request.prompts is None:
            return [self.encode(request, endpoint)]
        return [self._encode_prompt(prompt, request, endpoint) for prompt in request.prompts]

    def grammar(self, request: GenerationRequest, form: AnswerFormat | None = None) -> Grammar | None:
        """Return the grammar of a request's texts. Raises RequestRefused if this version can't hold it.

        It binds calls, and the content: the text after the reasoning, if the prompt has opened one.
        """
        content = None if request.grammar is None else grammar_text(request.grammar)
        if request.tools is not None and form is not None and form.calls is not None:
            return self._call_grammar(form.calls).grammar(request.tools, form.reasoning, content)
        if content is None:
            return None
        if self._reasoning is None or form is None or form.reasoning is None or not form.reasoning.opened:
            return Grammar(content)
        after = self._reasoning.end_ids
        return Grammar(after_reasoning(content, form.reasoning, thought=bool(after)), after)

    def _call_grammar(self, calls: CallAnswer) -> CallGrammar:
        added = self.tokenizer.added_tokens_decoder.items()
        tokens = {token.content: i for i, token in added if token.content.strip()}
        return CallGrammar(call_format(calls.form), tokens, self._chat.tools.parallel)

    def answer_format(self, request: GenerationRequest, endpoint: str, prompt: Sequence[int]) -> AnswerFormat | None:
        """Return how the text after a prompt splits; None: it is the content, as on /v1/completions.

        Raises InvalidValue if the request wants no reasoning and the prompt opens it.
        """
        if endpoint == COMPLETIONS_ENDPOINT:
            return None
        reasoning = None if self._reasoning is None else self._reasoning.format(prompt, request.reasoning)
        if reasoning is not None and self._continues_reasoning(request):
            reasoning = reasoning.model_copy(update={"opened": True})
        calls = None
        if request.tools is not None and request.tools.callable:
            calls = CallAnswer(form=self._chat.tools.format.name, named=request.tools.choice == "named")
        return AnswerFormat(reasoning=reasoning, calls=calls) if reasoning or calls else None

    def _continues_reasoning(self, request: GenerationRequest) -> bool:
        """Return whether the message that an answer continues, and does not echo, ends within its reasoning."""
        continues = request.sampling.continue_final_message and not request.sampling.echo
        if not continues or self._reasoning is None or request.messages is None:
            return False
        start, end = map(request.messages[-1].content.rfind, self._reasoning.markers)
        return start > end

    def sequence(
        self,
        key: tuple[Any, ...],
        prompt: list[int],
        sampling: SamplingParameters,
        choice: int,
        grammar: Grammar | None = None,
    ) -> EngineSequence:
        """Return one choice of a request as a sequence; `key` starts with its job.

        Its max_tokens is at most what the prompt leaves of the context. Raises InvalidValue for unknown token ids.
        """
        self._check_vocabulary(sampling.stop_token_ids, "stop_token_ids")
        self._check_vocabulary(sampling.logit_bias, "logit_bias")
        long = self._is_long(prompt, sampling)
        short_tokens = self.context_tokens if long else min(self.context_tokens, self.long_text_tokens or sys.maxsize)
        room = short_tokens - len(prompt)
        return EngineSequence(
            key=key,
            ids=list(prompt),
            num_prompt=len(prompt),
            max_tokens=room if sampling.max_tokens is None else min(sampling.max_tokens, room),
            sampling=Sampling(
                temperature=sampling.temperature if sampling.temperature >= _MIN_DIVISOR else 0.0,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                key=noise_key(sampling.seed, choice),
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                repetition_penalty=max(sampling.repetition_penalty, _MIN_DIVISOR),
                logit_bias=tuple(sampling.logit_bias.items()),
                logprobs=sampling.logprobs,
                min_tokens=sampling.min_tokens,
            ),
            eos_ids=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos_ids),
            grammar=grammar,
            long=long,
            group=key[0],
            traced_steps=sampling.record_trees,
        )

    def _is_long(self, prompt: Sequence[int], sampling: SamplingParameters) -> bool:
        """Return whether a text may grow beyond the original positions of longrope, as its request alone says.

        A request without max_tokens wants one token here: its text is long only if its prompt is.
        """
        wanted = len(prompt) + (sampling.max_tokens or 1)
        return self.long_text_tokens is not None and wanted > self.long_text_tokens

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a complete sequence of tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token: int) -> str:
        """Return one token as readable text; special tokens by name."""
        return str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def stream(
        self,
        sampling: SamplingParameters | None = None,
        prompt: Sequence[int] = (),
        endpoint: str = COMPLETIONS_ENDPOINT,
        form: AnswerFormat | None = None,
        grammar: Grammar | None = None,
    ) -> TextStream:
        """Return a new text stream for one choice; it ends at the first stop string of `sampling`.

        A completion continues its prompt, so its first token keeps its leading space; so does an answer that continues
        a message. Another chat answer starts a new text.
        """
        continues = sampling is not None and sampling.continue_final_message
        standalone = endpoint != COMPLETIONS_ENDPOINT and self._chat.has_template and not continues
        before = None if standalone else prompt
        return TextStream(self.tokenizer, sampling, before, form, grammar, self.shown_ids(form))

    def shown_ids(self, form: AnswerFormat | None) -> frozenset[int]:
        """Return the ids of special tokens that a text with this format shows: its markers."""
        shown: frozenset[int] = frozenset()
        if form is not None and form.reasoning is not None and self._reasoning is not None:
            shown |= self._reasoning.special_ids
        if form is not None and form.calls is not None:
            text = call_format(form.calls.form).text
            added = self.tokenizer.added_tokens_decoder.items()
            shown |= {i for i, token in added if token.special and token.content in text}
        return shown

    def _check_vocabulary(self, ids: Iterable[int], param: str) -> None:
        beyond = [i for i in ids if i >= self.vocabulary]
        if beyond:
            raise InvalidValue(
                f"token id {beyond[0]} is beyond the model's vocabulary of {self.vocabulary} tokens", param=param
            )

    def _encode_prompt(self, prompt: str | tuple[int, ...], request: GenerationRequest, endpoint: str) -> list[int]:
        if isinstance(prompt, str):
            return self.encode(request.model_copy(update={"prompt": prompt, "prompts": None}), endpoint)
        return self._checked(list(prompt), "prompt", request.sampling)

    def _checked(self, ids: list[int], param: str, sampling: SamplingParameters) -> list[int]:
        """Return the prompt's tokens, truncated if the request asks for it; refuse those that don't fit."""
        ids = self._truncated(ids, sampling)
        if len(ids) >= self.context_tokens:
            raise self._too_long(str(len(ids)), param)
        if not ids:
            raise InvalidValue("the prompt has no tokens", param=param)
        self._check_vocabulary(ids, param)  # a tokenizer can know more tokens than its model has embeddings
        return ids

    def _truncated(self, ids: list[int], sampling: SamplingParameters) -> list[int]:
        """Return the tokens that `truncate_prompt_tokens` keeps, as vLLM does."""
        kept = sampling.truncate_prompt_tokens
        if kept is None:
            return ids
        if kept < 0:
            kept = self.context_tokens - max(1, sampling.max_tokens or 1)
        if kept < 1:
            raise InvalidValue(
                f"max_tokens leaves no room for a prompt in the model's context of {self.context_tokens} tokens; "
                "lower it, or keep a number of tokens",
                param="truncate_prompt_tokens",
            )
        return ids[-kept:] if sampling.truncation_side == "left" else ids[:kept]

    def _encode(self, request: GenerationRequest, endpoint: str) -> list[int]:
        sampling = request.sampling
        truncates = sampling.truncate_prompt_tokens is not None
        if request.messages is None and (endpoint == COMPLETIONS_ENDPOINT or not self._chat.has_template):
            if request.tools is not None:
                raise InvalidValue("this model has no chat template, which would show it the tools", param="tools")
            text = request.prompt or ""
            self._check_length(text, "prompt", truncates)
            added = sampling.add_special_tokens is not False
            return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=added).ids)
        prompt = (ChatMessage(role="user", content=request.prompt or ""),)
        turns, tools = self._chat.tools.turns(request.messages or prompt, request.tools)
        arguments = template_arguments(request, self._chat.variables)
        check = partial(self._check_length, param=_prompt_field(request, endpoint), truncates=truncates)
        options = ChatOptions(
            add_generation_prompt=sampling.add_generation_prompt,
            continue_final_message=sampling.continue_final_message,
            add_special_tokens=sampling.add_special_tokens is True,
        )
        ids = self._chat.encode(turns, check, arguments, tools, options)
        begins = sampling.add_generation_prompt and not sampling.continue_final_message
        if request.grammar is None or self._reasoning is None or not begins:
            return ids
        return [*ids, *self._reasoning.opening(ids)]

    def _check_length(self, text: str, param: str, truncates: bool) -> None:
        """Refuse a text whose minimal number of tokens exceeds the context, without the slow tokenization."""
        if truncates:
            return
        least = self._length.min_tokens(text)
        if least >= self.context_tokens:
            raise self._too_long(f"at least {least}", param)

    def _too_long(self, count: str, param: str) -> PromptTooLong:
        return PromptTooLong(
            f"the prompt has {count} tokens and leaves no room for one new token in the model's context of "
            f"{self.context_tokens} tokens; shorten it",
            param=param,
        )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer. Raises ModelRefused if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelRefused(f"the tokenizer of {path} could not be loaded: {error_summary(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelRefused(f"{path} has no fast tokenizer (tokenizer.json), which streaming text needs")
    return tokenizer


def eos_ids(tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig | None) -> frozenset[int]:
    """Return the end-of-sequence ids of the generation config and the tokenizer."""
    configured = getattr(generation, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return frozenset(int(i) for i in ids if i is not None)


def _prompt_field(request: GenerationRequest, endpoint: str) -> str:
    """Return the field of the body that holds the prompt, for errors."""
    if request.messages is None:
        return "prompt"
    return "input" if endpoint == RESPONSES_ENDPOINT else "messages"
