"""The fields of a request and of its messages: one table for the parser, the API document and docs/fields.md.

It holds the fields of OpenAI, vLLM, SGLang and TGI. A field is honoured, dropped (it can't change the text), or refused
with a reason unless its value is idle: one that asks for nothing, such as the default of the engine that knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, get_args

from jobs.messages import CHAT_ENDPOINT, COMPLETIONS_ENDPOINT, RESPONSES_ENDPOINT, Endpoint, SamplingParameters


class Treatment(StrEnum):
    """What the service does with a field."""

    HONOURED = "honoured"
    DROPPED = "dropped"
    REFUSED = "refused"


_ALL: Final[tuple[Endpoint, ...]] = get_args(Endpoint)
_CHAT: Final[tuple[Endpoint, ...]] = (CHAT_ENDPOINT, RESPONSES_ENDPOINT)  # a response is a chat in other words
_TEXT: Final[tuple[Endpoint, ...]] = (COMPLETIONS_ENDPOINT,)
_NOT_RESPONSES: Final[tuple[Endpoint, ...]] = (CHAT_ENDPOINT, COMPLETIONS_ENDPOINT)
_RESPONSES: Final[tuple[Endpoint, ...]] = (RESPONSES_ENDPOINT,)


@dataclass(frozen=True, slots=True)
class Field:
    """One field. A name has two rows if the endpoints differ."""

    name: str
    type: str
    treatment: Treatment
    meaning: str  # of a refused field: the reason, as the end of its error
    idle: tuple[Any, ...] = ()  # values that ask for nothing, besides null
    neutral: Any = None  # replaces the idle values of an honoured field; None: the field is left out
    endpoints: tuple[Endpoint, ...] = _ALL
    same_as: str | None = None  # of an honoured field: the parameter that it is another name of

    def is_idle(self, value: Any) -> bool:
        """Return whether the value asks for nothing."""
        bare = _without_nulls(value)
        return bare is None or any(_same(bare, idle) for idle in self.idle)


def _honoured(name: str, kind: str, meaning: str, idle: tuple[Any, ...] = (), **more: Any) -> Field:
    return Field(name, kind, Treatment.HONOURED, meaning, idle, **more)


def _synonym(name: str, kind: str, same_as: str, *idle: Any, **more: Any) -> Field:
    return _honoured(name, kind, f"Same as {same_as}.", idle, same_as=same_as, **more)


def _dropped(kind: str, meaning: str, *names: str, endpoints: tuple[Endpoint, ...] = _ALL) -> Iterable[Field]:
    return (Field(name, kind, Treatment.DROPPED, meaning, endpoints=endpoints) for name in names)


def _refused(name: str, kind: str, reason: str, *idle: Any, endpoints: tuple[Endpoint, ...] = _ALL) -> Field:
    return Field(name, kind, Treatment.REFUSED, reason, idle, endpoints=endpoints)


# Idle values of sampling parameters that SamplingParameters does not take, and what replaces them.
_IDLE_SAMPLING: Final[Mapping[str, tuple[tuple[Any, ...], Any]]] = {
    "top_k": ((-1,), 0),
    "seed": ((-1,), None),
    "prompt_logprobs": ((False,), None),
}
_TYPES: Final[Mapping[str, str]] = {
    "seed": "integer or `identity`",
    "stop": "string or list of strings",
    "stop_token_ids": "list of integers",
    "logit_bias": "object",
    "ignore_eos": "boolean",
    "include_stop_str_in_output": "boolean",
    "skip_special_tokens": "boolean",
    "add_generation_prompt": "boolean",
    "continue_final_message": "boolean",
    "add_special_tokens": "boolean",
    "truncation_side": "string",
    "echo": "boolean",
    "return_token_ids": "boolean",
    "return_tokens_as_token_ids": "boolean",
}
_OF_CHATS: Final = ("add_generation_prompt", "continue_final_message")
_OF_COMPLETIONS: Final = ("n", "echo", "prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids")
_SAMPLING_ENDPOINTS: Final = dict.fromkeys(_OF_CHATS, _CHAT) | dict.fromkeys(_OF_COMPLETIONS, _NOT_RESPONSES)
_FLOATS: Final = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _sampling() -> Iterable[Field]:
    for name, info in SamplingParameters.model_fields.items():
        if name != "logprobs":  # its type differs between the endpoints
            idle, neutral = _IDLE_SAMPLING.get(name, ((), None))
            kind = _TYPES.get(name, "number" if name in _FLOATS else "integer")
            endpoints = _SAMPLING_ENDPOINTS.get(name, _ALL)
            yield _honoured(name, kind, info.description or "", idle, neutral=neutral, endpoints=endpoints)


_TOKENS: Final = "Set logit_bias, or a grammar for the text."
STRUCTURAL_TAGS: Final = "Structural tags are not supported; ask for tools, or send a grammar."
_SCHEMA: Final = "The text is JSON that is valid for this schema."
_REGEX: Final = "The whole text matches this expression."
_LARK: Final = "The text follows this grammar, in Lark or EBNF."
BUDGET: Final = "The length of the reasoning is not limited on its own; set max_tokens for both parts together."
_BEAMS: Final = "Beam search is not supported: each choice is sampled on its own."
_ADAPTERS: Final = "Adapters are not supported; name a model that is served."
_CODE: Final = "Code of the caller does not run in the service."
_TEMPLATE: Final = "The model's own chat template is used."
_IDENTITY: Final = "An identifier of the caller."
_ROUTING: Final = "A routing hint; the text is the same on every worker."
_MEDIA: Final = "Prompts are text."
_HINT: Final = "A hint that can't change the text."
_NO_RAW: Final = "A response has no place for it; ask /v1/chat/completions."


def _responses() -> Iterable[Field]:
    """Yield the fields that are of /v1/responses alone, and what the other endpoints say to them."""
    theirs = f"A field of {RESPONSES_ENDPOINT}."
    for name, kind, meaning, idle, instead in (
        ("max_output_tokens", "integer", "Cap of the answer, its reasoning included.", (), "It is called max_tokens."),
        ("text", "object", "format: the form of the answer, as response_format.", ({},), "Set response_format."),
        ("include", "list of strings", "message.output_text.logprobs returns them.", ([],), "Set logprobs."),
        ("truncation", "string", "auto: as truncate_prompt_tokens -1.", ("disabled",), "Set truncate_prompt_tokens."),
        ("background", "boolean", "Answer at once, and generate as a job.", (False,), f"{theirs} Submit a job."),
    ):
        yield _honoured(name, kind, meaning, idle, endpoints=_RESPONSES)
        yield _refused(name, kind, instead, *idle, endpoints=_NOT_RESPONSES)
    yield _honoured("metadata", "object", "Returned with the response.", ({},), endpoints=_RESPONSES)
    yield _honoured("store", "boolean", "False: the response can't be retrieved.", (True,), endpoints=_RESPONSES)
    yield _refused("n", "integer", "A response is one answer. Send it several times.", 1, endpoints=_RESPONSES)
    for name in ("echo", "return_token_ids", "return_tokens_as_token_ids"):
        yield _refused(name, "boolean", _NO_RAW, False, endpoints=_RESPONSES)
    yield _refused("prompt_logprobs", "integer", _NO_RAW, False, endpoints=_RESPONSES)
    yield _refused(
        "conversation", "string or object", f"{theirs} Conversations are not stored: set previous_response_id."
    )
    yield _refused("context_management", "list of objects", "Conversations are not compacted.", [])
    yield _refused("background_options", "object", "A background response has the window of a job.", {})
    yield from _dropped("integer", "It limits tools that the service does not have.", "max_tool_calls")
    yield from _dropped("object", _MEDIA, "image")
    yield from _dropped("object", "There are no such programs.", "access_programs")


FIELDS: Final[tuple[Field, ...]] = (
    *_sampling(),
    _honoured("max_completion_tokens", "integer", "Same as max_tokens; takes precedence."),
    _honoured("logprobs", "boolean", "Return log-probabilities.", endpoints=_CHAT),
    _honoured(
        "logprobs", "integer, 0 to 5", "Number of top tokens per token.", (False,), neutral=False, endpoints=_TEXT
    ),
    _honoured("top_logprobs", "integer, 0 to 20", "Number of top tokens per token; needs logprobs.", endpoints=_CHAT),
    _honoured("extra_body", "object", "Its fields are read as fields of the body and take precedence.", ({},)),
    # OpenAI
    *_dropped("boolean", "Only single requests are streamed; a batch or job ignores it.", "stream"),
    *_dropped("object", "Only for streams: include_usage ends them with the token counts.", "stream_options"),
    *_dropped("object", "Use the metadata of the job.", "metadata", endpoints=_NOT_RESPONSES),
    *_dropped("string", "The chat template writes the tools.", "tool_prompt", endpoints=_CHAT),
    *_dropped("object", "Drafts are chosen by the service.", "prediction", endpoints=_CHAT),
    *_dropped("string", _HINT, "prompt_cache_key", "prompt_cache_retention", "service_tier", "verbosity"),
    *_dropped("object", _HINT, "prompt_cache_options"),
    _honoured(
        "reasoning_effort",
        "string",
        "none switches the reasoning off, where the chat template can; others switch it on. Templates that read it "
        "get it.",
        endpoints=_CHAT,
    ),
    *_dropped("string", _IDENTITY, "safety_identifier", "user"),
    *_dropped("boolean", "Outputs are stored in any case.", "store", endpoints=(CHAT_ENDPOINT,)),
    _refused("audio", "object", "The answer is text.", endpoints=_CHAT),
    _refused("modalities", "list of strings", "The answer is text.", ["text"], [], endpoints=_CHAT),
    _refused("moderation", "object", "There is no moderation."),
    _refused("web_search_options", "object", "There is no web search.", endpoints=_CHAT),
    _honoured("tools", "list of objects", "Functions that the model may call.", ([],), endpoints=_CHAT),
    _honoured(
        "tool_choice",
        "string or object",
        "none, auto, required, a function, or allowed_tools. Auto with tools, else none.",
        endpoints=_CHAT,
    ),
    _honoured("parallel_tool_calls", "boolean", "False: at most one call in an answer.", endpoints=_CHAT),
    _refused("functions", "list of objects", "Send tools.", [], endpoints=_CHAT),
    _refused("function_call", "string or object", "Send tool_choice.", "none", "auto", endpoints=_CHAT),
    _honoured(
        "response_format",
        "object",
        "What the text must be: its type is text, json_object, or json_schema with a schema.",
        ({"type": "text"}, {}),
    ),
    _refused("suffix", "string", "Models complete prompts only at their end.", "", endpoints=_TEXT),
    _refused("best_of", "integer", "Choices are not ranked; set n.", 1, endpoints=_TEXT),
    # OpenAI's Responses
    *_responses(),
    # bASIC
    _honoured(
        "cache", "boolean", "False: computed, though an equal request has an answer; true where BASIC_CACHE asks."
    ),
    # vLLM
    _refused("use_beam_search", "boolean", _BEAMS, False),
    _refused("length_penalty", "number", _BEAMS, 1.0),
    _refused("early_stopping", "boolean", _BEAMS, False),
    *_dropped("boolean", "Special tokens get no spaces.", "spaces_between_special_tokens"),
    _refused("detokenize", "boolean", "The answer is text.", True),
    _refused("logprob_token_ids", "list of integers", "Log-probabilities are those of the top tokens.", []),
    _refused("allowed_token_ids", "list of integers", _TOKENS, []),
    _refused("bad_words", "list of strings", "Set logit_bias for the tokens to avoid.", []),
    *_dropped("boolean", "A raw prompt is continued in any case.", *_OF_CHATS, endpoints=_TEXT),
    _refused("documents", "list of objects", "Write documents into the messages.", [], endpoints=_CHAT),
    _refused("chat_template", "string", _TEMPLATE, "", endpoints=_CHAT),
    _honoured(
        "chat_template_kwargs",
        "object",
        "Arguments of the model's chat template; those that it does not read have no effect.",
        ({},),
        endpoints=_CHAT,
    ),
    _honoured(
        "enable_thinking",
        "boolean",
        "Switch the reasoning on or off; off is refused by a model whose chat template can't.",
        endpoints=_CHAT,
    ),
    _honoured(
        "thinking", "boolean or object", "Same as enable_thinking: type enabled or disabled.", ({},), endpoints=_CHAT
    ),
    _honoured("reasoning", "object", "enabled, effort and exclude, as above.", ({},), endpoints=_CHAT),
    _refused("thinking_token_budget", "integer", BUDGET, -1),
    _honoured(
        "include_reasoning", "boolean", "False leaves the reasoning out of the answer.", (True,), endpoints=_CHAT
    ),
    _honoured(
        "structured_outputs",
        "object",
        "One of json, json_object, regex, choice and grammar; for JSON also whitespace_pattern, "
        "disable_any_whitespace and disable_additional_properties.",
        ({},),
    ),
    _honoured("guided_json", "string or object", _SCHEMA, ("",)),
    _honoured("guided_json_object", "boolean", "The text is a JSON object.", (False,)),
    _honoured("guided_regex", "string", _REGEX, ("",)),
    _honoured("guided_choice", "list of strings", "The text is one of these.", ([],)),
    _honoured("guided_grammar", "string", _LARK, ("",)),
    _honoured(
        "guided_whitespace_pattern", "string", "White space between the parts of JSON; without JSON it is ignored."
    ),
    _refused("structural_tag", "string", STRUCTURAL_TAGS, ""),
    *_dropped("string", "The service has one backend.", "guided_decoding_backend"),
    _refused("logits_processors", "list", _CODE, []),
    _refused("vllm_xargs", "object", _CODE, {}),
    _refused("priority", "integer", "A job has a priority class, and single requests run first.", 0),
    *_dropped("string", _IDENTITY, "request_id", "session_id", "cache_salt"),
    *_dropped("object", _ROUTING, "kv_transfer_params", "ec_transfer_params"),
    *_dropped("object", _MEDIA, "media_io_kwargs", "mm_processor_kwargs"),
    *_dropped("boolean", _MEDIA, "return_mm_kwargs", "use_audio_in_video"),
    *_dropped("integer", "The service chooses when it sends text.", "stream_interval"),
    _refused("return_token_offsets", "boolean", "Token offsets are not returned.", False),
    _refused("return_prompt_text", "boolean", "The answer does not repeat the prompt.", False),
    _refused("routed_experts_prompt_start", "integer", "Routing of experts is not returned.", 0),
    _refused("repetition_detection", "object", "Set repetition_penalty or frequency_penalty.", {}),
    _refused("watermarking", "boolean", "Texts have no watermark.", False),
    # SGLang
    _honoured("json_schema", "string or object", _SCHEMA, ("",)),
    _honoured("regex", "string", _REGEX, ("",)),
    _honoured("ebnf", "string", _LARK, ("",)),
    _refused("stop_regex", "string or list of strings", "Set stop.", "", []),
    _synonym("no_stop_trim", "boolean", "include_stop_str_in_output"),
    _synonym("sampling_seed", "integer", "seed", -1),
    _refused("lora_path", "string or list of strings", _ADAPTERS, "", []),
    _refused("session_params", "object", "A request has no session; send the whole conversation.", {}),
    _refused("custom_logit_processor", "string", _CODE, ""),
    _refused("custom_params", "object", _CODE, {}),
    _honoured("separate_reasoning", "boolean", "False leaves the reasoning in the content.", (True,), endpoints=_CHAT),
    *_dropped("boolean", "The reasoning is streamed as it is written.", "stream_reasoning", endpoints=_CHAT),
    _refused("return_hidden_states", "boolean", "Hidden states are not returned.", False),
    _refused("return_routed_experts", "boolean", "Routing of experts is not returned.", False),
    _refused("routed_experts_start_len", "integer", "Routing of experts is not returned.", 0),
    *_dropped("boolean", "The usage has the token counts.", "return_cached_tokens_details", "return_meta_info"),
    _refused("prompt_embeds", "string or list of strings", _MEDIA, "", [], endpoints=_TEXT),
    _refused("return_prompt_token_ids", "boolean", "Set return_token_ids.", False),
    _refused("task", "string", _TEMPLATE, "", endpoints=_CHAT),
    *_dropped("integer", _MEDIA, "max_dynamic_patch", "min_dynamic_patch", endpoints=_CHAT),
    _refused("input_ids", "list of integers", "Send token ids as the prompt of /v1/completions."),
    *_dropped("string", _IDENTITY, "rid", "extra_key", "ngram_corpus_id"),
    *_dropped("object", _IDENTITY, "custom_labels"),
    *_dropped("object", _MEDIA, "images_config"),
    *_dropped("string", _ROUTING, "bootstrap_host"),
    *_dropped("integer", _ROUTING, "bootstrap_port", "bootstrap_room", "data_parallel_rank"),
    *_dropped("integer", _ROUTING, "routed_dp_rank", "disagg_prefill_dp_rank"),
    # TGI
    _synonym("max_new_tokens", "integer", "max_tokens"),
    _synonym("min_new_tokens", "integer", "min_tokens"),
    _honoured("do_sample", "boolean", "False is temperature 0.", (True,), same_as="temperature"),
    _refused("typical_p", "number", "Set top_p or min_p.", 1.0),
    _synonym("truncate", "integer", "truncate_prompt_tokens"),
    _refused("watermark", "boolean", "Texts have no watermark.", False),
    _honoured(
        "grammar", "object or string", "An object of type (json, regex) and value; as a text, a grammar.", ({}, "")
    ),
    _refused("guideline", "string", "Write it as a system message.", "", endpoints=_CHAT),
    _refused("adapter_id", "string", _ADAPTERS, ""),
    _synonym("return_full_text", "boolean", "echo", endpoints=_TEXT),
    _refused("return_full_text", "boolean", "Set echo to repeat a message that is continued.", False, endpoints=_CHAT),
    _refused("details", "boolean", "Set logprobs.", False),
    _refused("decoder_input_details", "boolean", "Set prompt_logprobs.", False),
    _refused("top_n_tokens", "integer", "Set top_logprobs.", 0),
    # Options of client libraries that end up in bodies
    *_dropped("object", "An option of the client library.", "extra_headers", "extra_query"),
    *_dropped("number", "An option of the client library; timeout_s limits a request of a job.", "timeout"),
)

MESSAGE_FIELDS: Final[tuple[Field, ...]] = (
    _honoured("role", "string", "system, developer (read as system), user, assistant or tool."),
    _honoured(
        "content",
        "string or list of parts",
        "A text, or parts whose texts are joined. Null is empty, but not of users.",
    ),
    _honoured("tool_calls", "list of objects", "Calls of an assistant: id, type, function.", ([],), endpoints=_CHAT),
    _honoured("tool_call_id", "string", "Of a tool message: the call that it answers.", endpoints=_CHAT),
    _refused("function_call", "object", "This old form is not supported; send tool_calls.", {}, endpoints=_CHAT),
    _refused("audio", "object", _MEDIA, {}, endpoints=_CHAT),
    _refused("images", "list", _MEDIA, [], endpoints=_CHAT),
    _honoured("prefix", "boolean", "Of the last message, an assistant's: the answer continues it.", endpoints=_CHAT),
    *_dropped("string", "A tool message has the name of the function that it answers.", "name", endpoints=_CHAT),
    _honoured(
        "reasoning_content",
        "string",
        "The reasoning of an earlier answer, for chat templates that read it.",
        endpoints=_CHAT,
    ),
    _honoured("reasoning", "string", "Same as reasoning_content.", endpoints=_CHAT),
    *_dropped("string", "Templates get the content only.", "refusal", endpoints=_CHAT),
    *_dropped("any", "Any other field, as answers and logs carry them.", "…", endpoints=_CHAT),
)

_BY_NAME: Final = {name: [field for field in FIELDS if field.name == name] for name in {f.name for f in FIELDS}}
_MESSAGE_FIELDS_BY_NAME: Final = {field.name: field for field in MESSAGE_FIELDS}

PARAMETERS: Final = frozenset(_BY_NAME)


def field_of(name: str, endpoint: Endpoint) -> Field:
    """Return the row of a parameter for an endpoint; of one that the endpoint does not have, that of another.

    A row of another endpoint is one that is not honoured, if there is any: what is not read must not pass.
    """
    rows = _BY_NAME[name]
    own = next((row for row in rows if endpoint in row.endpoints), None)
    return own or next((row for row in rows if row.treatment is not Treatment.HONOURED), rows[0])


def message_field(name: str) -> Field:
    """Return the row of a field of a message; unknown fields are dropped."""
    return _MESSAGE_FIELDS_BY_NAME.get(name, _MESSAGE_FIELDS_BY_NAME["…"])


def names(treatment: Treatment) -> frozenset[str]:
    """Return the parameters with this treatment on one of the endpoints."""
    return frozenset(field.name for field in FIELDS if field.treatment is treatment)


def _without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its outermost object."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _same(value: Any, idle: Any) -> bool:
    """Return whether the values are equal in JSON, where 1 is 1.0 but 0 is not false."""
    if isinstance(value, bool) or isinstance(idle, bool):
        return value is idle
    numbers = isinstance(value, int | float) and isinstance(idle, int | float)
    return (numbers or type(value) is type(idle)) and value == idle
