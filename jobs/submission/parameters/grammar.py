"""Read the fields that say what a text must be, in the forms of OpenAI, vLLM, SGLang and TGI, into one GrammarSpec.

Fields that contradict each other are refused. `jobs.grammar` then says whether the service can hold the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json

from jobs.errors import InvalidValue, MissingParameter, UnsupportedParameter
from jobs.grammar.closing import closed
from jobs.grammar.compiler import check
from jobs.messages import Endpoint, GrammarSpec
from jobs.submission.fields import STRUCTURAL_TAGS, field_of
from jobs.submission.values import boolean, kind, object_fields, refuse_unknown, shown

MAX_CHOICES: Final = 1_000  # of `choice`
MAX_NAME_CHARS: Final = 64

_FORMATS: Final = ("text", "json_object", "json_schema")
_WITH_VALUE: Final = ("json", "json_object", "json_schema", "regex")  # types of TGI's grammar
_WHITESPACE: Final = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
_KINDS: Final = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_JSON_ONLY: Final = "has a meaning for JSON only: give it together with a schema or json_object"


@dataclass(frozen=True, slots=True)
class _Found:
    """A grammar, and the field that asks for it."""

    spec: GrammarSpec
    param: str


def read_grammar(
    fields: Mapping[str, Any], endpoint: Endpoint, default: GrammarSpec | None = None
) -> GrammarSpec | None:
    """Return the grammar that the parameters of a request ask for; `default`, of its job, if they ask for nothing.

    A `response_format` of type text asks for none. Raise RequestRefused for an invalid grammar, and for parameters
    that contradict each other.
    """
    found = [
        each
        for name, read in _READERS.items()
        if name in fields and not field_of(name, endpoint).is_idle(fields[name])
        for each in read(fields[name], name)
    ]
    whitespace = fields.get("guided_whitespace_pattern")
    if whitespace is not None:
        found = [_with_whitespace(each, _text(whitespace, "guided_whitespace_pattern")) for each in found]
    if not found:
        return None if fields.get("response_format") else default
    first, *others = found
    for other in others:
        if other.spec != first.spec:
            raise InvalidValue(
                f"{first.param} and {other.param} both say what the text must be. Give one of them.", param=other.param
            )
    check(first.spec, first.param)
    return first.spec


def _response_format(value: Any, param: str) -> Iterator[_Found]:
    form = object_fields(value, param)
    name = form.get("type")
    if name == "text":
        refuse_unknown(form, {"type"}, f"{param}.")
    elif name == "json_schema" and "value" not in form:
        yield _named_schema(form, param)
    elif name == "json_object" and "value" not in form:
        refuse_unknown(form, {"type", "schema"}, f"{param}.")
        yield _schema(form["schema"], f"{param}.schema") if "schema" in form else _Found(_OBJECT, param)
    elif "value" in form:
        yield from _tagged(form, param)
    elif name == "structural_tag":
        raise UnsupportedParameter(STRUCTURAL_TAGS, param=f"{param}.type")
    elif name is None:
        raise MissingParameter(f"The type is missing: one of {', '.join(_FORMATS)}.", param=f"{param}.type")
    else:
        raise InvalidValue(f"must be one of {', '.join(_FORMATS)}, not {shown(name)}", param=f"{param}.type")


def _named_schema(form: Mapping[str, Any], param: str) -> _Found:
    """Return the schema of OpenAI's form, or of the flat one in which `schema` stands beside `type`."""
    if "json_schema" in form:
        refuse_unknown(form, {"type", "json_schema"}, f"{param}.")
        param = f"{param}.json_schema"
        form = object_fields(form["json_schema"], param)
    refuse_unknown(form, {"type", "name", "description", "strict", "schema"}, f"{param}.")
    if len(_text(form.get("name", ""), f"{param}.name")) > MAX_NAME_CHARS:
        raise InvalidValue(f"must have at most {MAX_NAME_CHARS} characters", param=f"{param}.name")
    _text(form.get("description", ""), f"{param}.description")
    boolean(form.get("strict", False), f"{param}.strict")  # a schema is held in any case
    if "schema" not in form:
        raise MissingParameter("The schema is missing.", param=f"{param}.schema")
    return _schema(form["schema"], f"{param}.schema")


def _structured_outputs(value: Any, param: str) -> Iterator[_Found]:
    form = {name: each for name, each in object_fields(value, param).items() if not name.startswith("_")}  # vLLM's own
    refuse_unknown(form, {*_KINDS, *_WHITESPACE}, f"{param}.")
    asked = [name for name in _KINDS if form.get(name, False) is not False]
    if form.get("structural_tag"):
        raise UnsupportedParameter(STRUCTURAL_TAGS, param=f"{param}.structural_tag")
    options = {name: form[name] for name in _WHITESPACE if form.get(name, False) is not False}
    if len(asked) > 1:
        raise InvalidValue(f"{asked[0]} and {asked[1]} contradict each other. Give one.", param=f"{param}.{asked[1]}")
    if not asked:
        if options:
            raise InvalidValue(_JSON_ONLY, param=f"{param}.{next(iter(options))}")
        return
    for found in _READERS[f"guided_{asked[0]}"](form[asked[0]], f"{param}.{asked[0]}"):
        yield _with_options(found, options, param)


def _with_options(found: _Found, options: Mapping[str, Any], param: str) -> _Found:
    if boolean(options.get("disable_additional_properties", False), f"{param}.disable_additional_properties"):
        found = _closed(found, f"{param}.disable_additional_properties")
    if boolean(options.get("disable_any_whitespace", False), f"{param}.disable_any_whitespace"):
        if "whitespace_pattern" in options:
            raise InvalidValue("contradicts disable_any_whitespace", param=f"{param}.whitespace_pattern")
        return _with_whitespace(found, "", f"{param}.disable_any_whitespace")
    pattern = options.get("whitespace_pattern")
    if pattern is None:
        return found
    where = f"{param}.whitespace_pattern"
    return _with_whitespace(found, _text(pattern, where), where)


def _closed(found: _Found, param: str) -> _Found:
    """Return the schema with no properties but the named ones, wherever it does not say otherwise."""
    if found.spec.kind != "json_schema":
        raise InvalidValue("has a meaning for a schema only", param=param)
    return _Found(found.spec.model_copy(update={"value": _dumped(closed(from_json(found.spec.value)))}), found.param)


def _with_whitespace(found: _Found, pattern: str, param: str = "guided_whitespace_pattern") -> _Found:
    if found.spec.kind not in ("json_schema", "json_object"):
        raise InvalidValue(_JSON_ONLY, param=param)
    return _Found(found.spec.model_copy(update={"whitespace": pattern}), found.param)


def _tgi_grammar(value: Any, param: str) -> Iterator[_Found]:
    """Read `grammar`: an object in TGI, a text in llama.cpp."""
    if isinstance(value, str):
        yield _Found(GrammarSpec(kind="grammar", value=value), param)
    else:
        yield from _tagged(object_fields(value, param), param)


def _tagged(form: Mapping[str, Any], param: str) -> Iterator[_Found]:
    """Read TGI's object of type and value."""
    refuse_unknown(form, {"type", "value"}, f"{param}.")
    name = form.get("type")
    if name not in _WITH_VALUE:
        raise InvalidValue(f"must be one of {', '.join(_WITH_VALUE)}, not {shown(name)}", param=f"{param}.type")
    if form.get("value") is None:
        raise MissingParameter("The value is missing.", param=f"{param}.value")
    where = f"{param}.value"
    if name == "regex":
        yield _Found(GrammarSpec(kind="regex", value=_text(form["value"], where)), where)
    elif name == "json_schema":
        yield _named_schema(object_fields(form["value"], where), where)
    else:
        yield _schema(form["value"], where)


def _json_schema(value: Any, param: str) -> Iterator[_Found]:
    yield _schema(value, param)


def _json_object(value: Any, param: str) -> Iterator[_Found]:
    if boolean(value, param):
        yield _Found(_OBJECT, param)


def _regex(value: Any, param: str) -> Iterator[_Found]:
    yield _Found(GrammarSpec(kind="regex", value=_text(value, param)), param)


def _grammar(value: Any, param: str) -> Iterator[_Found]:
    yield _Found(GrammarSpec(kind="grammar", value=_text(value, param)), param)


def _choice(value: Any, param: str) -> Iterator[_Found]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise InvalidValue("must be a list of at least one string", param=param)
    if len(value) > MAX_CHOICES:
        raise InvalidValue(f"must have at most {MAX_CHOICES} choices, not {len(value)}", param=param)
    yield _Found(GrammarSpec(kind="choice", value=_dumped(list(dict.fromkeys(value)))), param)


def _schema(value: Any, param: str) -> _Found:
    """Return a schema: an object, true or false, or one of them as JSON text, as vLLM and SGLang take it."""
    if isinstance(value, str):
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError as exc:
            raise InvalidValue(f"The schema is not JSON: {exc}.", param=param) from exc
    if not isinstance(value, dict | bool):
        raise InvalidValue(f"A schema is an object, not {kind(value)}.", param=param)
    return _Found(GrammarSpec(kind="json_schema", value=_dumped(value)), param)


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {kind(value)}", param=param)
    return value


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


_OBJECT: Final = GrammarSpec(kind="json_object")
_READERS: Final[Mapping[str, Callable[[Any, str], Iterator[_Found]]]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json_schema,
    "guided_json_object": _json_object,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "json_schema": _json_schema,
    "regex": _regex,
    "ebnf": _grammar,
    "grammar": _tgi_grammar,
}
