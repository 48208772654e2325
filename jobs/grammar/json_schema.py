"""Rewrite a JSON schema (drafts 4 to 2020-12) into one that llguidance holds exactly, or refuse it by keyword.

llguidance reads keywords in order, drops what it does not know, and takes some in a wider sense than JSON Schema. So
only keywords with the same sense reach it; others are written in terms of these, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from jobs.errors import InvalidValue, RequestRefused, UnsupportedParameter
from jobs.grammar.evaluation import NotEvaluated, is_valid
from jobs.grammar.keywords import Misplaced, at, count_keyword, listed, string_keywords, type_keyword, values_keywords
from jobs.grammar.negation import ASSERTIONS, NoComplement, complement
from jobs.grammar.numbers import number_keywords
from jobs.grammar.objects import object_keywords, without_general_pattern, without_unnamed
from jobs.grammar.overlap import beyond, disjoint, listed_values
from jobs.grammar.recursion import remove_endless
from jobs.grammar.references import References, TooManySteps

MAX_DEPTH: Final = 40  # of schemas in schemas
MAX_SCHEMAS: Final = 5_000
MAX_DEFINITIONS: Final = 400
_MAX_CHOSEN: Final = 40  # alternatives of a oneOf

Json = dict[str, Any]
Place = tuple[str, ...]

_VALUES_AND_MORE: Final = frozenset(
    {"allOf", "anyOf", "oneOf", "not", "if", "contains", "uniqueItems", "minProperties", "pattern", "multipleOf"}
)
_MAPS: Final = ("properties", "patternProperties")  # keywords whose objects map names to schemas
_OLD_DRAFT: Final = re.compile(r"draft-0[3-7]/")  # siblings of $ref have no meaning in these
# Keywords that can't be held: values that ask for nothing, and what to do.
_REFUSED: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "uniqueItems": ((False,), "Leave it out and check the answer, or ask for one boolean property per item."),
    "contains": ((True, {}), "Say with items or prefixItems which items there are."),
    "unevaluatedItems": ((True, {}), "Use items beside prefixItems."),
    "unevaluatedProperties": ((True, {}), "Use additionalProperties."),
    "$dynamicRef": ((), "Use $ref."),
    "$recursiveRef": ((), "Use $ref."),
}


def rewrite(schema: Any) -> Json:
    """Return a schema of the same values for llguidance. Raise RequestRefused, whose `param` is the keyword's place."""
    try:
        return _Rewriter(schema).run()
    except Misplaced as exc:
        raise exc.refused from exc
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as exc:  # no check has named it
        raise InvalidValue("The schema is not valid: the value of a keyword has the wrong type.") from exc


class _Rewriter:
    """Rewrites one schema and the definitions that it names."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._references = References(root)
        self._names: dict[int, str] = {}  # of schemas that are named by a reference, by identity
        self._waiting: list[tuple[str, Any, Place]] = []
        self._kept: list[Any] = []  # schemas made here, whose identities must stay their own
        self._pairs: dict[tuple[int, int], Json] = {}
        self._num_schemas = 0
        declared = root.get("$schema") if isinstance(root, dict) else None
        self._old = isinstance(declared, str) and _OLD_DRAFT.search(declared) is not None

    def run(self) -> Json:
        root: Any = self._schema(self._root, (), whole=True)
        definitions: Json = {}
        while self._waiting:
            name, schema, place = self._waiting.pop()
            definitions[name] = self._schema(schema, place, whole=True)
        definitions = remove_endless(root, definitions)
        whole: Json = {"anyOf": [root]} if isinstance(root, bool) else root
        return whole | ({"$defs": definitions} if definitions else {})

    def _schema(self, schema: Any, place: Place, *, whole: bool = False, combined: bool = False) -> Any:
        """Return the rewritten schema at a place; not `whole`: maybe as a reference to it.

        `combined`: other keywords hold for the same value. llguidance can't combine these with a reference to a
        definition that is being read, so references are replaced by their schemas.
        """
        if isinstance(schema, bool):
            return schema
        self._check(schema, place)
        if self._old and "$ref" in schema:
            schema = {"$ref": schema["$ref"]}
        if combined and "$ref" in schema and len(ASSERTIONS & schema.keys()) == 1:
            with at(*place):
                target = self._references.find(_string(schema["$ref"]))
            return self._schema(target, (*place, "$ref"), whole=True, combined=True)
        if not whole and _combines_references(schema):
            return self._named(schema, place)
        with at(*place):
            schema = without_general_pattern(schema, self._both)
        values = self._valid_values(schema)
        if values is not None:
            with at(*place):
                return values_keywords({"enum": values}) if values else False
        with at(*place):
            _refuse_keywords(schema)
            found = type_keyword(schema) | values_keywords(schema) | number_keywords(schema)
            lengths, patterns = string_keywords(schema)
            found |= object_keywords(schema, lambda part, *steps: self._schema(part, (*place, *steps)))
            found |= lengths | self._array_keywords(schema, place)
            if not combined and not _APPLICATORS.keys() & schema.keys():
                found = without_unnamed(found)
        parts = self._in_order(schema, place, found, combined or len(ASSERTIONS & schema.keys()) > 1)
        return _conjunction([*parts, *({"pattern": pattern} for pattern in patterns)])

    def _both(self, first: Any, second: Any) -> Any:
        """Return a schema for which both must hold; the same two get the same one, or recursion would not end."""
        if _bare(first) == _bare(second):
            return first
        self._kept += [first, second]
        return self._pairs.setdefault((id(first), id(second)), {"allOf": [first, second]})

    def _valid_values(self, schema: Json) -> list[Any] | None:
        """Return the valid values of a schema that lists them beside other keywords; None for other schemas."""
        if not _VALUES_AND_MORE & schema.keys():
            return None
        try:
            values = listed_values(schema, self._references)
            return values and [value for value in values if is_valid(value, schema, self._references)]
        except TooManySteps:
            raise
        except (NotEvaluated, RequestRefused, TypeError, AttributeError):
            return None

    def _in_order(self, schema: Json, place: Place, found: Json, combined: bool) -> list[Json]:
        """Return the keywords of a schema and those that apply other schemas to the same value, in their order.

        It decides the order of the properties of an answer.
        """
        parts: list[Json] = []
        waits = found
        for name in schema:
            if name in found:
                parts += [waits] if waits else []
                waits = {}
            elif name in _APPLICATORS:
                with at(*place, name):
                    parts.append(_APPLICATORS[name](self, schema, (*place, name), combined))
        return [*parts, waits]

    def _check(self, schema: Any, place: Place) -> None:
        with at(*place):
            if not isinstance(schema, dict):
                raise InvalidValue("A schema is an object, true or false.")
            self._num_schemas += 1
            if self._num_schemas > MAX_SCHEMAS:
                raise InvalidValue(f"The schema has more than {MAX_SCHEMAS} parts; make it smaller.")
            if len(place) > 2 * MAX_DEPTH:
                raise InvalidValue(f"The schema is nested in more than {MAX_DEPTH} levels.")

    def _array_keywords(self, schema: Json, place: Place) -> Json:
        found: Json = count_keyword(schema, "minItems") | count_keyword(schema, "maxItems")
        first, rest = "prefixItems", "items"
        if isinstance(schema.get("items"), list):  # before 2020-12
            first, rest = "items", "additionalItems"
        if first in schema:
            parts = enumerate(listed(schema[first], first))
            found["prefixItems"] = [self._schema(part, (*place, first, str(n))) for n, part in parts]
        if rest in schema:
            found["items"] = self._schema(schema[rest], (*place, rest))
        return found

    def _reference(self, schema: Json, place: Place, combined: bool) -> Json:
        reference = _string(schema["$ref"])
        target = self._references.find(reference)
        if combined:
            return {"allOf": [self._schema(target, place, whole=True, combined=True)]}
        return self._named(target, tuple(reference.removeprefix("#/").split("/")))

    def _named(self, schema: Any, place: Place) -> Json:
        """Return a reference to a schema, which is rewritten later."""
        if id(schema) not in self._names:
            if len(self._names) >= MAX_DEFINITIONS:
                raise InvalidValue(f"The schema has more than {MAX_DEFINITIONS} definitions; make it smaller.")
            self._names[id(schema)] = name = f"d{len(self._names)}"
            self._kept.append(schema)
            self._waiting.append((name, schema, place))
        return {"$ref": f"#/$defs/{self._names[id(schema)]}"}

    def _all_of(self, schema: Json, place: Place, combined: bool) -> Json:
        return {"allOf": self._parts(schema, place, combined or len(listed(schema["allOf"])) > 1)}

    def _any_of(self, schema: Json, place: Place, combined: bool) -> Json:
        return {"anyOf": self._parts(schema, place, combined)}

    def _parts(self, schema: Json, place: Place, combined: bool) -> list[Any]:
        parts = enumerate(listed(schema[place[-1]]))
        return [self._schema(part, (*place, str(n)), whole=combined, combined=combined) for n, part in parts]

    def _one_of(self, schema: Json, place: Place, combined: bool) -> Json:
        """Return an anyOf of alternatives that exclude each other, if that can be said."""
        parts = [self._resolved(part) for part in listed(schema["oneOf"])]
        if len(parts) > _MAX_CHOSEN:
            raise UnsupportedParameter(f"More than {_MAX_CHOSEN} alternatives can't be held; use anyOf.")
        return {"anyOf": [self._without_others(n, parts, place, combined) for n in range(len(parts))]}

    def _without_others(self, n: int, parts: list[Any], place: Place, combined: bool) -> Any:
        """Return an alternative without the values of those that may overlap with it."""
        document = self._references
        others = [m for m in range(len(parts)) if m != n and not disjoint(parts[n], parts[m], document)]
        place = (*place, str(n))
        if not others:
            return self._schema(parts[n], place, whole=True, combined=combined)
        try:
            against = [
                self._made(beyond(parts[n], parts[m], document) or complement(parts[m], document), place)
                for m in others
            ]
        except NoComplement:
            raise UnsupportedParameter(
                f"The alternatives {n} and {others[0]} may both be valid for a value, which can't be excluded. Use "
                "anyOf, or give each alternative a required property with another const."
            ) from None
        return {"allOf": [self._schema(parts[n], place, whole=True, combined=True), *against]}

    def _not(self, schema: Json, place: Place, combined: bool) -> Json:
        return {"allOf": [self._complement(schema["not"], place)]}

    def _if(self, schema: Json, place: Place, combined: bool) -> Json:
        then, other = schema.get("then", True), schema.get("else", True)
        if then is True and other is True:
            return {}
        held = self._schema(schema["if"], place, whole=True, combined=True)
        other = self._schema(other, (*place[:-1], "else"), whole=True, combined=True)
        then = self._schema(then, (*place[:-1], "then"), whole=True, combined=True)
        return {"anyOf": [{"allOf": [held, then]}, {"allOf": [self._complement(schema["if"], place), other]}]}

    def _dependencies(self, schema: Json, place: Place, combined: bool) -> Json:
        """Return for each property: it is absent, or what depends on it holds."""
        given = schema[place[-1]]
        if not isinstance(given, dict):
            raise InvalidValue("must be an object")
        demands = []
        for name, needed in given.items():
            part = {"required": needed} if isinstance(needed, list) else needed
            absent = {"properties": {name: False}}
            demands.append({"anyOf": [absent, self._schema(part, (*place, name), whole=True, combined=True)]})
        return {"allOf": demands}

    def _complement(self, schema: Any, place: Place) -> Any:
        try:
            return self._made(complement(schema, self._references), place)
        except NoComplement:
            raise UnsupportedParameter(
                "This schema can't be excluded: only type, const, enum, required, properties, bounds and lengths can. "
                "Say what is valid instead."
            ) from None

    def _made(self, schema: Any, place: Place) -> Any:
        self._kept.append(schema)
        return self._schema(schema, place, whole=True, combined=True)

    def _resolved(self, schema: Any) -> Any:
        """Return the schema that a bare reference names."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema or (len(schema) > 1 and not self._old):
                break
            schema = self._references.find(_string(schema["$ref"]))
        return schema


_APPLICATORS: Final[dict[str, Callable[[_Rewriter, Json, Place, bool], Json]]] = {
    "$ref": _Rewriter._reference,
    "allOf": _Rewriter._all_of,
    "anyOf": _Rewriter._any_of,
    "oneOf": _Rewriter._one_of,
    "not": _Rewriter._not,
    "if": _Rewriter._if,
    "dependencies": _Rewriter._dependencies,
    "dependentRequired": _Rewriter._dependencies,
    "dependentSchemas": _Rewriter._dependencies,
}


def _bare(schema: Any) -> Any:
    """Return a schema without annotations, to compare it."""
    if not isinstance(schema, dict):
        return [_bare(part) for part in schema] if isinstance(schema, list) else schema
    return {
        name: {key: _bare(each) for key, each in part.items()}
        if name in _MAPS and isinstance(part, dict)
        else _bare(part)
        for name, part in schema.items()
        if name in ASSERTIONS
    }


def _combines_references(schema: Json) -> bool:
    """Return whether other keywords hold for the same value as a reference."""
    parts = schema.get("allOf")
    many = len(ASSERTIONS & schema.keys()) > 1 or (isinstance(parts, list) and len(parts) > 1)
    return many and _has_reference(schema)


def _has_reference(schema: Any) -> bool:
    """Return whether a reference in a schema holds for the same value as the schema."""
    if not isinstance(schema, dict):
        return False
    lists = [schema[name] for name in ("allOf", "anyOf", "oneOf") if isinstance(schema.get(name), list)]
    return "$ref" in schema or any(_has_reference(part) for parts in lists for part in parts)


def _refuse_keywords(schema: Json) -> None:
    for name, (idle, advice) in _REFUSED.items():
        if name not in schema or any(type(schema[name]) is type(each) and schema[name] == each for each in idle):
            continue
        if name == "uniqueItems" and schema.get("maxItems") in (0, 1):
            continue
        raise UnsupportedParameter(f"This keyword can't be held. {advice}", param=name)


def _conjunction(parts: list[Json]) -> Json:
    """Return one schema for all parts; those whose keywords are taken go to its `allOf`."""
    whole: Json = {}
    others: list[Any] = []
    for part in parts:
        if whole.keys() & part.keys():
            others.append(part)
        else:
            whole |= part
    return whole | {"allOf": [*whole.get("allOf", []), *others]} if others else whole


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidValue("must be a string")
    return value
