"""Turn a GrammarSpec into a grammar of llguidance: the API server to check it, the worker to decode by it.

Both get the same text from the same request. The checks come first: llguidance has no limits on the depth of its own
recursion, and a hostile grammar must not end a process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

from llguidance import LLMatcher
from pydantic_core import from_json

from jobs.errors import BasicError, InvalidValue, RequestRefused, UnsupportedParameter
from jobs.grammar.context_free import lark
from jobs.grammar.json_schema import rewrite
from jobs.grammar.patterns import full_pattern, literal, only_blanks
from jobs.grammar.trial import find_fault
from jobs.messages import GrammarSpec

MAX_CHARS: Final = 200_000  # of a schema, an expression or a grammar
_CACHED: Final = 64
_RUST: Final = "pyo3_runtime"  # module of a panic, which is no Exception

# One line break with its indentation, or a few spaces: what writers of JSON use. Small models write it without an end.
WHITESPACE: Final = r"\r?\n[ \t]{0,40}|[ \t]{1,4}"
# A name that is written with escapes would pass for another one, so texts have no \u escapes.
_JSON_OPTIONS: Final = {
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',
    "json_allow_general_unicode_escapes": False,
}


def check(spec: GrammarSpec, param: str) -> None:
    """Raise RequestRefused, with the place in the field `param`, if the service can't hold the grammar."""
    refused = _refusal(spec)
    if refused is not None:
        kind, message, place = refused
        raise kind(message, param=f"{param}.{place}" if place else param)


@lru_cache(maxsize=_CACHED)
def grammar_text(spec: GrammarSpec) -> str:
    """Return the grammar in the form that `llguidance.LLMatcher` takes. Raise RequestRefused if it can't be held."""
    if len(spec.value) > MAX_CHARS:
        raise InvalidValue(f"It has {len(spec.value)} characters; the limit is {MAX_CHARS}.")
    return _WRITERS[spec.kind](spec)


@lru_cache(maxsize=_CACHED)
def _refusal(spec: GrammarSpec) -> tuple[type[RequestRefused], str, str] | None:
    """Return the error class, message and place of a grammar that can't be held; None if it can."""
    try:
        text = grammar_text(spec)
        is_error, messages = LLMatcher.validate_grammar_with_warnings(text)
        fault = messages[0] if messages else find_fault(text)
    except RequestRefused as refused:
        return type(refused), refused.message, refused.param or ""
    except BaseException as panic:
        if type(panic).__module__ != _RUST:
            raise
        return UnsupportedParameter, f"The grammar library fails on this: {_sentence(str(panic) or 'panic')}", ""
    if fault is None:
        return None
    place = _place_of(spec) if spec.kind == "json_schema" else ""
    what = "The grammar is not valid" if spec.kind == "grammar" else "This can't be held"
    return (InvalidValue if is_error else UnsupportedParameter), f"{what}: {_sentence(fault)}", place


def json_grammar(schema: Any, whitespace: str | None = None) -> dict[str, Any]:
    """Return a schema as llguidance takes it, also inside of a Lark grammar (`%json`). Raise RequestRefused."""
    return {"x-guidance": _json_options(whitespace)} | rewrite(schema)


def _json_options(whitespace: str | None) -> dict[str, Any]:
    if whitespace == "":
        return _JSON_OPTIONS | {"whitespace_flexible": False}
    return _JSON_OPTIONS | {"whitespace_pattern": WHITESPACE if whitespace is None else only_blanks(whitespace)}


def _schema_text(spec: GrammarSpec) -> str:
    schema = {"type": "object"} if spec.kind == "json_object" else from_json(spec.value, allow_inf_nan=False)
    written = json.dumps(json_grammar(schema, spec.whitespace))
    try:
        return str(LLMatcher.grammar_from_json_schema(written))
    except ValueError as exc:  # a limit of its parser
        raise InvalidValue("The schema is nested too deep; make it flatter.") from exc


def _regex_text(spec: GrammarSpec) -> str:
    return str(LLMatcher.grammar_from_regex(full_pattern(spec.value)))


def _choice_text(spec: GrammarSpec) -> str:
    choices = "|".join(map(literal, from_json(spec.value)))
    return str(LLMatcher.grammar_from_regex(f"(?:{choices})"))


def _lark_text(spec: GrammarSpec) -> str:
    return str(LLMatcher.grammar_from_lark(lark(spec.value)))


_WRITERS: Final[dict[str, Callable[[GrammarSpec], str]]] = {
    "json_schema": _schema_text,
    "json_object": _schema_text,
    "regex": _regex_text,
    "choice": _choice_text,
    "grammar": _lark_text,
}


# What to do, by a part of llguidance's message.
_ADVICE: Final = {
    "schema too large": "its alternatives and conditions (allOf, anyOf, if) combine to too many; use fewer together.",
    "items; max is": "it allows too many alternatives at one place, such as optional properties; make these fewer.",
    "too many expressions": "its expressions are too complex together; use shorter repeats in patterns.",
    "min/maxProperties": "minProperties and maxProperties need every listed property to be required.",
    "circular references": "a definition that names itself is combined with other keywords; write these into it.",
    "are not disjoint": "a name may match two of its patternProperties; let them exclude each other.",
}


def _sentence(message: str) -> str:
    first = message.removeprefix("WARNING: ").strip().splitlines()[0]
    known = next((advice for part, advice in _ADVICE.items() if part in first), None)
    return known or first[:300].rstrip(".") + "."


def _place_of(spec: GrammarSpec) -> str:
    """Return the innermost place of a schema that can't be held alone."""
    root = from_json(spec.value)
    place, found = "", root
    while True:
        parts = ((f"{place}.{steps}" if place else steps, part) for steps, part in _parts(found))
        inner = next((each for each in parts if not _compiles(each[1], root)), None)
        if inner is None:
            return place
        place, found = inner


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas directly inside of a schema, and the steps to them."""
    if not isinstance(schema, dict):
        return
    for name in ("properties", "patternProperties"):
        for key, part in (schema.get(name) or {}).items():
            yield f"{name}.{key}", part
    for name in ("allOf", "anyOf", "oneOf", "prefixItems"):
        for n, part in enumerate(schema.get(name) or ()):
            yield f"{name}.{n}", part
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield name, schema[name]


def _compiles(part: Any, root: Any) -> bool:
    """Return whether a part of a schema can be held with the definitions of the whole."""
    if not isinstance(part, dict):
        return True
    shared = {name: root[name] for name in ("$defs", "definitions", "$schema") if name in root}
    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(json_grammar(shared | part)))
    except (BasicError, ValueError):
        return True  # it names another part of the whole, or is nested too deep
    return not LLMatcher.validate_grammar_with_warnings(text)[1]
