"""A schema that is taken is held as the jsonschema library reads it; others are refused by keyword and place."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from jobs.errors import InvalidValue, RequestRefused, UnsupportedParameter
from jobs.grammar.compiler import check
from tests.unit.jobs.grammar.reading import accepts, random_text, reader, schema_spec

NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "additionalProperties": False,
}
SHAPES = [
    {"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "number"}}, "required": ["kind"]},
    {"type": "object", "properties": {"kind": {"enum": ["box", "cube"]}}, "required": ["kind"]},
]
OLD = "http://json-schema.org/draft-07/schema#"

# Schemas, and values of which the jsonschema library says whether they are valid.
HELD: list[tuple[Any, list[Any]]] = [
    ({}, [1, "a", None, [1, {"a": []}]]),
    ({"type": ["integer", "null"]}, [1, None, 1.5, "1"]),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, [-4, -3, 11, 12]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0, 0.5, 1, 1.01]),
    (
        {
            "type": "integer",
            "minimum": 1,
            "exclusiveMinimum": True,
            "$schema": "http://json-schema.org/draft-04/schema#",
        },
        [1, 2],
    ),
    ({"type": "integer", "format": "int64", "maximum": 9223372036854775807}, [0, 10**17]),
    ({"type": "number", "maximum": 1.7976931348623157e308}, [12.5, -3]),
    ({"type": "integer", "multipleOf": 7}, [14, 15, -7, 0]),
    ({"type": "number", "multipleOf": 2.5}, [7.5, 5, 6]),
    ({"const": 1.0}, [1, 2]),
    ({"enum": [1, 2.5, 'a\n"é', None, True, [1], {"b": 1, "a": 2}]}, [1, 2.5, 'a\n"é', None, True, False, [1], [2]]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["a", "ab", "é\n😀", "abcd"]),
    ({"type": "string", "pattern": "^a|b$"}, ["ax", "xb", "xa"]),
    ({"type": "string", "pattern": "[0-9]{2,9}"}, ["a12b", "a1b"]),
    ({"type": "string", "pattern": "^(?=.*[0-9])(?=.*[a-z]).{3,}$"}, ["ab1", "abc", "a1"]),
    ({"type": "string", "pattern": r"^(?!\s*$).+"}, [" ", " a "]),
    ({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2}, [[], [True], [True, False, True]]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[1, "a"], [1, "a", 2], ["a"]],
    ),
    (
        {"type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "null"}, "$schema": OLD},
        [[1, None], [1, 2]],
    ),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, [[1]]),
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        [{"a": 1, "b": "x"}, {"a": "x"}, {"b": 1}],
    ),
    (
        {"type": "object", "patternProperties": {"^x-": {"type": "integer"}}, "additionalProperties": False},
        [{"x-a": 1}, {"x-a": "1"}, {"y": 1}],
    ),
    (
        {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": {"type": "integer"}},
        [{"a": 1}, {"c": 1}],
    ),
    (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "properties": {"a": {"type": "integer"}, "c": {}}},
        [{"a": 1, "b": "x"}, {"c": 1}],
    ),
    (
        {"type": "object", "required": ["b", "a"], "properties": {"a": {"type": "null"}}},
        [{"a": None, "b": 1}, {"a": None}],
    ),
    (
        {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 1, "minProperties": 1},
        [{}, {"a": 1}, {"a": 1, "b": 2}],
    ),
    (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "additionalProperties": False,
            "minProperties": 1,
        },
        [{}, {"a": 1}, {"b": 1}],
    ),
    (
        {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {}, "b": {}}},
        [{"a": 1, "b": 2}, {"a": 1}, {"b": 1}],
    ),
    (
        {
            "dependencies": {"a": {"properties": {"b": {"type": "integer"}}}},
            "properties": {"a": {}, "b": {}},
            "$schema": OLD,
        },
        [{"a": 1, "b": 2}, {"a": 1, "b": "x"}, {"b": "x"}],
    ),
    (
        {
            "$ref": "#/$defs/a",
            "$defs": {
                "a": {
                    "type": "object",
                    "properties": {"x": {"type": ["object", "integer"]}},
                    "patternProperties": {".*": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}]}},
                }
            },
        },
        [{"x": {"x": 1}, "y": 2}, {"x": "1"}, {"y": "1"}, {"y": {"z": {}}}],
    ),
    ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, [1, 2, 5]),
    ({"oneOf": SHAPES}, [{"kind": "circle", "r": 1}, {"kind": "box"}, {"kind": "x"}]),
    (
        {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": SHAPES[0], "b": SHAPES[1]}},
        [{"kind": "cube"}, {}],
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {}],
    ),
    (
        {
            "oneOf": [
                {"properties": {"v": {"const": "2"}, "a": {}}, "required": ["v"]},
                {"properties": {"v": {"const": "3"}, "b": {}}, "required": ["v"]},
            ]
        },
        [{"v": "2"}, {"v": "3"}, {"v": "4"}, {}, 1, "a"],
    ),
    (
        {
            "oneOf": [
                {"type": "string"},
                {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
                {"type": "object", "properties": {"b": {"type": "string"}}, "additionalProperties": False},
            ]
        },
        ["x", {"a": "x"}, {"b": "x"}, {}, {"a": "x", "b": "x"}],
    ),
    (
        {
            "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {
                "a": {"allOf": [{"$ref": "#/$defs/c"}, {"properties": {"kind": {"const": 1}}}], "required": ["kind"]},
                "b": {"allOf": [{"$ref": "#/$defs/c"}, {"properties": {"kind": {"const": 2}}}], "required": ["kind"]},
                "c": {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}},
            },
        },
        [{"next": {"kind": 1}, "kind": 2}, {"kind": 3}, {"next": {"kind": 2}, "kind": 2}],
    ),
    ({"enum": [1, "a", [2, 2], {"b": 1}], "not": {"type": "integer"}}, [1, "a", [2, 2], {"b": 1}]),
    ({"allOf": [{"enum": [[1], [1, 1], "aa"]}, {"uniqueItems": True, "pattern": "^a$"}]}, [[1], [1, 1], "aa"]),
    ({"not": {"type": ["object", "array"]}}, [1, "a", None, {}, []]),
    ({"type": "string", "not": {"enum": ["ab", "abc", ""]}}, ["a", "ab", "abcd", "abc", "", "b"]),
    ({"type": "integer", "not": {"enum": [3, 5]}}, [2, 3, 4, 5, 6]),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "not": {"required": ["a"]}}, [{}, {"a": 1}]),
    (
        {
            "type": "object",
            "properties": {"kind": {"enum": ["x", "y"]}, "n": {}},
            "required": ["kind", "n"],
            "if": {"properties": {"kind": {"const": "x"}}},
            "then": {"properties": {"n": {"type": "integer"}}},
            "else": {"properties": {"n": {"type": "string"}}},
        },
        [{"kind": "x", "n": 1}, {"kind": "y", "n": 1}, {"kind": "y", "n": "a"}],
    ),
    (
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        [{"value": 1, "next": {"value": 2, "next": None}}, {"value": 1}],
    ),
    ({"$ref": "#/definitions/a~1b%25", "definitions": {"a/b%": {"type": "integer"}}}, [1, "a"]),
    ({"$id": "http://x/y", "$ref": "http://x/y#/$defs/a", "$defs": {"a": {"type": "null"}}}, [None, 1]),
    ({"$ref": "#n", "$defs": {"a": {"$anchor": "n", "type": "null"}}}, [None, 1]),
    (
        {
            "properties": {"a": {"$ref": "#/definitions/s", "minLength": 9}},
            "definitions": {"s": {"type": "string"}},
            "$schema": OLD,
        },
        [{"a": "x"}, {"a": 1}],
    ),
    ({"type": "object", "title": "T", "x-other": {"minLength": "?"}, "nullable": True, "default": 3}, [{}, 1]),
]

REFUSED: list[tuple[Any, str, str]] = [
    ({"properties": {"a": {"contains": {"type": "null"}}}}, "properties.a.contains", "items"),
    ({"items": {"uniqueItems": True}}, "items.uniqueItems", "check the answer"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties", "additionalProperties"),
    ({"allOf": [{"$ref": "http://example.com/a.json"}]}, "allOf.0.$ref", "$defs"),
    ({"$ref": "#/$defs/none"}, "$ref", "no part"),
    ({"$ref": "#nowhere"}, "$ref", "anchor"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "$ref", "itself"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "", "without an end"),
    (False, "", "No value is valid"),
    ({"type": "object", "properties": {"a": {"type": "int"}}}, "properties.a.type", "integer"),
    ({"type": "string", "format": "phone"}, "format", "'phone'"),
    ({"type": "string", "pattern": r"\bfoo"}, "pattern", "word boundary"),
    ({"type": "string", "pattern": "(a"}, "pattern", "character 3"),
    ({"not": {"pattern": "a"}}, "not", "Say what is valid"),
    ({"if": {"items": {"type": "null"}}, "then": {"minItems": 1}}, "if", "Say what is valid"),
    ({"oneOf": [{"type": "integer"}, {"multipleOf": 3}]}, "oneOf", "anyOf"),
    ({"type": "number", "multipleOf": 0.1}, "multipleOf", "smaller unit"),
    ({"const": 9007199254740993}, "const", "string"),
    ({"const": "a\u0001"}, "const", "U+0001"),
    ({"enum": []}, "enum", "at least one"),
    ({"properties": {"a": {"type": "object", "required": True}}}, "properties.a.required", "list of names"),
    ({"type": "object", "minProperties": 2}, "minProperties", "required"),
    ({"type": "array", "minItems": 1_000_000}, "minItems", "context"),
    ({"type": "string", "minLength": -1}, "minLength", "whole number"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "", "minLength"),
    ({"patternProperties": {"a": {"type": "null"}, "b": {"type": "integer"}}}, "", "exclude each other"),
    ({"properties": {"x": {"properties": [1]}}}, "properties.x.properties", "object"),
    ({"anyOf": [{"type": "null"}, 3]}, "anyOf.1", "A schema is an object"),
    ({"allOf": [{"enum": [False]}], "$ref": []}, "$ref", "string"),
    ({"oneOf": [{"type": 3}, {"type": "null"}]}, "oneOf.0.type", "must be one of"),
    ({"type": "integer", "format": []}, "format", "string"),
    ({"not": {"required": [1]}}, "not", "Say what is valid"),
    ({"type": "number", "multipleOf": 0, "allOf": [{"enum": [1]}]}, "multipleOf", "above 0"),
    ({"allOf": 3}, "allOf", "list"),
]


@pytest.mark.parametrize(("schema", "values"), HELD, ids=[json.dumps(schema)[:70] for schema, _ in HELD])
def test_a_schema_allows_its_valid_values_and_no_others(schema: Any, values: list[Any]) -> None:
    matcher = reader(schema_spec(schema))
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema)
    for value in values:
        assert accepts(matcher, json.dumps(value, ensure_ascii=False)) == validator.is_valid(value), value
    for seed in range(4):
        if (text := random_text(matcher, seed)) is not None:
            assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize(("schema", "place", "said"), REFUSED, ids=[json.dumps(each[0])[:70] for each in REFUSED])
def test_a_schema_that_can_not_be_held_is_refused_with_keyword_and_place(schema: Any, place: str, said: str) -> None:
    with pytest.raises((InvalidValue, UnsupportedParameter)) as refused:
        check(schema_spec(schema), "field")
    assert refused.value.param == (f"field.{place}" if place else "field")
    assert said in refused.value.message


def test_a_pattern_that_makes_pythons_re_search_for_hours_is_read_at_once() -> None:
    text = "a" * 60 + "!"
    schema = {"enum": [text, "aa"], "allOf": [{"pattern": "^(a+)+$"}], "propertyNames": {"pattern": "^(a+)+$"}}
    matcher = reader(schema_spec(schema | {"properties": {text: {}}}))
    assert accepts(matcher, '"aa"')
    assert not accepts(matcher, f'"{text}"')


def test_a_name_is_written_in_one_way_so_no_escape_passes_for_another_name() -> None:
    named = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    matcher = reader(schema_spec(named))
    assert accepts(matcher, '{"a":1,"b":"x"}')
    assert not accepts(matcher, r'{"\u0061":"x"}')


def test_properties_have_the_order_of_the_schema() -> None:
    matcher = reader(schema_spec({"type": "object", "properties": {"b": {"type": "null"}, "a": {"type": "null"}}}))
    assert accepts(matcher, '{"b":null,"a":null}')
    assert not accepts(matcher, '{"a":null,"b":null}')


def test_a_name_decides_how_a_part_of_an_answer_is_read_not_where_the_schema_stands() -> None:
    first = {
        "allOf": [{"properties": {"z": {"type": "null"}}}],
        "properties": {"a": {"type": "null"}},
        "type": "object",
    }
    matcher = reader(schema_spec(first | {"required": ["z", "a"]}))
    assert accepts(matcher, '{"z":null,"a":null}'), "allOf stands first, so its properties do"


def test_white_space_is_what_writers_of_json_use_and_never_endless() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    values: list[Any] = [{"a": [1, 2]}, {"a": []}]
    for value in values:
        for indent in (None, 2, 8, "\t"):
            assert accepts(reader(schema_spec(schema)), json.dumps(value, indent=indent)), indent
    assert not accepts(reader(schema_spec(schema)), '{\n\n"a":[]}')
    assert not accepts(reader(schema_spec(schema)), '{"a":     []}')
    assert not accepts(reader(schema_spec(schema, "")), '{"a": []}')
    assert accepts(reader(schema_spec(schema, r"[\n ]*")), '{"a":\n\n\n      []}')


def _chain(length: int) -> Any:
    names = {f"d{n}": {"properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": names | {f"d{length}": {"type": "null"}}}


def _nested(depth: int) -> Any:
    schema: Any = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, Any] = {
    "deep": _nested(100),
    "chain": _chain(5_000),
    "wide": {"properties": {f"p{n}": {} for n in range(1_001)}},
    "many": {"anyOf": [{"properties": {f"p{n}": {} for n in range(900)}} for _ in range(6)]},
    "values": {"enum": list(range(5_001))},
    "product": {"allOf": [{"anyOf": [{"required": [f"a{k}{n}"]} for n in range(60)]} for k in range(4)]},
    "optional": {"type": "object", "properties": {f"p{n}": {} for n in range(500)}, "minProperties": 1},
    "comparisons": {
        "oneOf": [
            {
                "oneOf": [
                    {"type": "object", "properties": {"k": {"const": [a, b]}}, "required": ["k"]} for b in range(30)
                ]
            }
            for a in range(30)
        ]
    },
    "many optional": {"type": "object", "properties": {f"p{n}": {} for n in range(600)}},
    "patterns": {"patternProperties": {f"^a{n}b": {} for n in range(100)}},
    "conditions": {"allOf": [{"if": {"required": [f"a{n}"]}, "then": {"required": [f"b{n}"]}} for n in range(12)]},
    "repeats": {"pattern": "((a{99}){99}){99}"},
    "groups": {"pattern": "(" * 500 + "a" + ")" * 500},
    "long": {"const": "a" * 200_001},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused_before_it_costs_anything(name: str) -> None:
    with pytest.raises(RequestRefused):
        check(schema_spec(HOSTILE[name]), "field")


_NAMED: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
_MORE = '{"a":1,"b":2}'


@pytest.mark.parametrize(
    ("schema", "more"),
    [
        (_NAMED, False),
        ({"$ref": "#/$defs/named", "$defs": {"named": _NAMED}}, False),
        ({"anyOf": [_NAMED, {"type": "null"}]}, False),
        ({**_NAMED, "additionalProperties": True}, True),
        ({**_NAMED, "additionalProperties": {"type": "integer"}}, True),
        ({**_NAMED, "required": ["b"]}, True),
        ({"type": "object"}, True),
        ({"allOf": [_NAMED, {"properties": {"b": {"type": "integer"}}}]}, True),
        ({**_NAMED, "anyOf": [{"required": ["b"]}, {"required": ["a"]}]}, True),
        ({"allOf": [{"$ref": "#/$defs/named"}, {"required": ["b"]}], "$defs": {"named": _NAMED}}, True),
    ],
)
def test_properties_without_a_name_are_written_only_where_the_schema_speaks_of_them(
    schema: dict[str, Any], more: bool
) -> None:
    matcher = reader(schema_spec(schema))
    assert accepts(matcher, _MORE) == more
