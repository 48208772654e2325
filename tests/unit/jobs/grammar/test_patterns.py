"""Patterns find what Python's `re` finds, in its reading or in that of ECMA 262; others are refused by name."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
from collections.abc import Callable

import pytest

from jobs.errors import RequestRefused
from jobs.grammar.formats import PATTERNS
from jobs.grammar.patterns import full_pattern
from jobs.messages import GrammarSpec
from tests.unit.jobs.grammar.reading import accepts, reader, schema_spec

TEXTS = [
    "",
    "a",
    "b",
    "ab",
    "ba",
    "aab",
    "xaby",
    "\n",
    "é",
    "5",
    "a1_",
    "-",
    "a-b",
    " ",
    "A",
    "/",
    "\\",
    '"',
    "x.y",
    "$",
]
FOUND = [
    "^a|b$", "^(a|b)$", "a$|^$", "(^|x)a", "^.$", r"\d", r"\D", r"^\W$", r"\s", r"^\S+$", r"[^\w]", r"[^\d]", r"[\W_]",
    r"^(?!\s*$).+", "^(?=.*a)(?=.*b).*$", "^(?:a?b?){2}$", r"\u00e9", "a{2}", "^a{1,2}b$", "(?:)", "", "^$", r"[\]a]",
    r"[a\-z]", "^[-a]$", "a|", "(a|b|)$", r"\/", "[/]", '^"$', r"\\", r"\.", "^(a$|b)", "a{", "^a*?$", "(?P<n>a)b",
    r"\x61", r"^\$$", "(^a|^b)", "^(^a)", r"[\d.-]+", "a*b?", "^x?a{1,}",
]  # fmt: skip
REFUSED = {
    r"(?<=a)b": "lookbehind", r"\bfoo": "word boundary", "a++": "possessive", r"(a)\1": "reference", "x?^a": "anchor",
    "(?i)a": "group", r"[\ud800-\udbff]": "surrogate", "(?!foo)a": "negative lookahead", "a(?=b)": "lookahead",
    "(": "without )", "a)": "without (", "[a": "without ]", r"\q": "no escape", "a{3,2}": "smaller", "*a": "repeat",
    "(a{1000}){1000}": "limit", "(^a)+": "repeated anchor", r"\p": "property",
}  # fmt: skip


@pytest.mark.parametrize("pattern", FOUND)
def test_a_pattern_is_found_in_the_same_texts_as_in_python(pattern: str) -> None:
    matcher = reader(schema_spec({"type": "string", "pattern": pattern}))
    for text in TEXTS:
        found = re.search(pattern.replace("$", r"\Z") if not pattern.count(r"\$") else pattern, text) is not None
        assert accepts(matcher, json.dumps(text, ensure_ascii=False)) == found, text


@pytest.mark.parametrize("pattern", REFUSED)
def test_a_pattern_that_is_not_regular_or_not_valid_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(RequestRefused, match=re.escape(REFUSED[pattern])):
        full_pattern(pattern)


def test_a_class_matches_only_what_it_matches_in_ecma_and_in_python() -> None:
    matcher = reader(schema_spec({"type": "string", "pattern": r"^(\d|\W)$"}))
    assert [text for text in ("5", "٣", "é", "-", "…") if accepts(matcher, f'"{text}"')] == ["5", "-", "…"]


@pytest.mark.parametrize(
    ("spec", "right", "wrong"),
    [
        (GrammarSpec(kind="regex", value="^[0-9]{3}-x$"), ["123-x"], ["12-x", "a123-x", ""]),
        (GrammarSpec(kind="choice", value='["a","ab","é \\" \\\\ \\n."]'), ["a", "ab", 'é " \\ \n.'], ["b", "abc", ""]),
        (GrammarSpec(kind="json_object"), ['{"a": [1]}', "{}"], ["[]", "1", '{"a"}']),
        (GrammarSpec(kind="grammar", value='start: "a" b+\nb: /[0-9]/ | "(" b ")"'), ["a1", "a(2)3"], ["a", "b"]),
        (
            GrammarSpec(kind="grammar", value='root ::= "x" [0-9]+ tail?\ntail ::= "\\u00e9"'),
            ["x12", "x1é"],
            ["x", "é"],
        ),
    ],
)
def test_expressions_choices_and_grammars_hold_for_the_whole_text(
    spec: GrammarSpec, right: list[str], wrong: list[str]
) -> None:
    matcher = reader(spec)
    assert [text for text in right if not accepts(matcher, text)] == []
    assert [text for text in wrong if accepts(matcher, text)] == []


def _is(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def test_dates_and_addresses_are_those_of_the_calendar_and_of_the_address_space() -> None:
    dates = [
        f"{year}-{day}" for year in ("0001", "1900", "2000", "2023", "2024") for day in ("02-28", "02-29", "04-31")
    ]
    addresses = ["::", "::1", "1::", "1:2:3:4:5:6:7:8", "::1.2.3.4", "1::8:1.2.3.4", "1:2", ":::", "1:2:3:4:5:6:7:8:9"]
    for name, texts, read in (
        ("date", dates, datetime.date.fromisoformat),
        ("ipv6", addresses, ipaddress.IPv6Address),
        ("ipv4", ["1.2.3.4", "1.2.3", "256.1.1.1", "01.2.3.4"], ipaddress.IPv4Address),
    ):
        matcher = reader(schema_spec({"type": "string", "format": name}))
        for text in texts:
            assert accepts(matcher, f'"{text}"') == _is(read, text), text


def test_every_format_is_an_expression_that_can_be_held() -> None:
    for name in PATTERNS:
        reader(schema_spec({"type": "string", "format": name}))
