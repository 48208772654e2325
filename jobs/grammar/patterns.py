"""Translate regular expressions of JSON Schema (ECMA 262) into those of llguidance (Rust), which match whole texts.

Python's `re`, which checks answers, reads some classes otherwise. A class matches here only what it matches in both:
`\\d` is 0 to 9, and `\\D` is no digit of any script. Expressions that are not regular are refused by name. So are
anchors inside of an expression, except where an alternative begins or ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from jobs.errors import InvalidValue, UnsupportedParameter

MAX_PATTERN_CHARS: Final = 10_000
MAX_REPEATS: Final = 10_000  # of one part, nested repeats multiplied
_MAX_DEPTH: Final = 50

ANY: Final = "(?s:.)"  # any character
_DOT: Final = r"[^\x{a}\x{d}\x{2028}\x{2029}]"
# What a class matches in ECMA and in Python; and what it matches in one of them, for negated classes.
_SPACE: Final = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_SPACES: Final = _SPACE + r"\x{1c}-\x{1f}\x{85}\x{feff}"
_NARROW: Final = {
    "d": "0-9",
    "D": r"\P{Nd}",
    "w": "0-9A-Z_a-z",
    "W": r"[^\p{L}\p{N}_]",
    "s": _SPACE,
    "S": f"[^{_SPACES}]",
}
_WIDE: Final = {
    "d": r"\p{Nd}",
    "D": "[^0-9]",
    "w": r"\p{L}\p{N}_",
    "W": "[^0-9A-Z_a-z]",
    "s": _SPACES,
    "S": f"[^{_SPACE}]",
}
_CONTROLS: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_PROPERTY: Final = re.compile(r"\{(?:(?:Script|sc|Script_Extensions|scx|General_Category|gc)=)?[A-Za-z_]+\}")
_COUNT: Final = re.compile(r"\{([0-9]{1,6})(?:(,)([0-9]{0,6}))?\}")
_GROUP_NAME: Final = re.compile(r"P?<[A-Za-z_$][\w$]*>")
_LOOKS: Final = {"=": "lookahead", "!": "negative lookahead", "<=": "lookbehind", "<!": "negative lookbehind"}


@dataclass(frozen=True, slots=True)
class _Part:
    """A translated part: of an alternative that must stand at the start or the end of the text, or anywhere.

    Each term has two texts: its own, and the shortest that has the same meaning where any text may follow or precede.
    """

    terms: tuple[tuple[str, str], ...]
    at_start: bool = False
    at_end: bool = False
    is_empty: bool = False  # it matches the empty text only
    may_be_empty: bool = False
    looks: tuple[str, ...] = ()  # whole texts that look-aheads at the start demand

    @classmethod
    def of(cls, text: str, **more: Any) -> _Part:
        """Return a part of one term."""
        return cls(((text, text),), **more)

    @property
    def text(self) -> str:
        """The expression."""
        return "".join(text for text, _ in self.terms)

    def found_in(self, around: str) -> str:
        """Return the expression of the texts in which the part is found; `around` matches what may stand around it."""
        terms = list(self.terms)
        ends = [end for end, fixed in ((0, self.at_start), (-1, self.at_end)) if around and not fixed]
        for end in ends:
            while terms and terms[end][1] == "":
                terms.pop(end)
            if terms:
                terms[end] = (terms[end][1], terms[end][1])
        text = "".join(text for text, _ in terms)
        return f"{'' if self.at_start else around}{text}{'' if self.at_end else around}"


_EMPTY: Final = _Part((), is_empty=True, may_be_empty=True)
_Parts = tuple[_Part, ...]  # alternatives


@lru_cache(maxsize=1024)
def search_patterns(pattern: str) -> tuple[str, ...]:
    """Return expressions that a whole text matches if and only if the pattern is found in it."""
    return _whole(_Parser(pattern).parse(), ANY + "*")


@lru_cache(maxsize=1024)
def full_pattern(pattern: str) -> str:
    """Return the expression that a text matches if the pattern matches all of it. Its anchors change nothing."""
    patterns = _whole(_Parser(pattern).parse(), "")
    if len(patterns) > 1:
        raise UnsupportedParameter("A lookahead can't be held; write the expression without it.")
    return patterns[0]


def only_blanks(pattern: str) -> str:
    """Return a pattern for white space between the parts of JSON; raise InvalidValue if it allows something else."""
    written = re.sub(r"\\[tnr]|\\x(?:09|0[aA]|0[dD]|20)", " ", pattern)
    if "^" in written or not re.fullmatch(r"(?:[ \t\r\n\[\](){}|?*+,0-9-]|\\s|\?:)*", written):
        raise InvalidValue(
            r"must match only the white space of JSON: spaces, \t, \n and \r", param="whitespace_pattern"
        )
    return full_pattern(
        pattern.replace(r"\s", r"[ \t\n\r]") if "[" not in pattern else pattern.replace(r"\s", r" \t\n\r")
    )


def literal(text: str) -> str:
    """Return the expression of a text."""
    return "".join(char if char.isalnum() and char.isascii() else rf"\x{{{ord(char):x}}}" for char in text)


def _whole(parts: _Parts, around: str) -> tuple[str, ...]:
    looks = parts[0].looks
    if any(part.looks != looks for part in parts):
        raise UnsupportedParameter("A lookahead in one of several alternatives can't be held.")
    return (f"(?:{'|'.join(part.found_in(around) for part in parts)})", *looks)


def _joined(parts: _Parts) -> _Part:
    """Return alternatives without anchors as one part."""
    if len(parts) == 1:
        return parts[0]
    text = f"(?:{'|'.join(part.text for part in parts)})"
    return _Part.of(text, may_be_empty=any(part.may_be_empty for part in parts))


class _Parser:
    """A recursive-descent parser over one pattern."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise InvalidValue(f"The expression has {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}.")
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Parts:
        parts, _ = self._alternatives()
        if self._at < len(self._pattern):
            raise self._invalid("a ) without (")
        return parts

    def _peek(self, length: int = 1) -> str:
        return self._pattern[self._at : self._at + length]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _invalid(self, what: str) -> InvalidValue:
        return InvalidValue(f"The expression is not valid at character {self._at + 1}: {what}.")

    def _refused(self, what: str, advice: str = "write the expression without it") -> UnsupportedParameter:
        return UnsupportedParameter(f"{what} at character {self._at + 1} of the expression can't be held; {advice}.")

    def _alternatives(self) -> tuple[_Parts, int]:
        """Return the alternatives up to a closing parenthesis, and the number of repeats of the largest part."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise InvalidValue(f"The expression has groups in more than {_MAX_DEPTH} levels.")
        found: list[_Part] = []
        repeats = 1
        while True:
            parts, count = self._sequence()
            found += parts
            repeats = max(repeats, count)
            if not self._take("|"):
                self._depth -= 1
                return _merged(found), repeats

    def _sequence(self) -> tuple[_Parts, int]:
        sequence: _Parts = (_EMPTY,)
        repeats = 1
        while self._peek() not in ("", "|", ")"):
            parts, count = self._term()
            repeats = max(repeats, count)
            sequence = tuple(both for a in sequence for b in parts if (both := self._then(a, b)) is not None)
            if len(sequence) > _MAX_DEPTH:
                raise InvalidValue("The expression has too many anchors.")
        return sequence or (_Part.of(r"[^\s\S]"),), repeats

    def _then(self, first: _Part, second: _Part) -> _Part | None:
        """Return one part after the other; None if an anchor between them makes that impossible."""
        if second.at_start and not first.is_empty:
            if first.may_be_empty:
                raise self._refused("An anchor ^ inside", "put it at the start of an alternative")
            return None
        if first.at_end and not second.is_empty:
            if second.may_be_empty:
                raise self._refused("An anchor $ inside", "put it at the end of an alternative")
            return None
        if second.looks and not (first.is_empty and first.at_start):
            raise self._refused("A lookahead", "only those right after a leading ^ are held")
        return _Part(
            first.terms + second.terms,
            first.at_start or second.at_start,
            first.at_end or second.at_end,
            first.is_empty and second.is_empty,
            first.may_be_empty and second.may_be_empty,
            first.looks + second.looks,
        )

    def _term(self) -> tuple[_Parts, int]:
        parts, repeats = self._atom()
        while (count := self._quantifier()) is not None:
            parts, repeats = self._repeated(parts, repeats, *count)
        return parts, repeats

    def _quantifier(self) -> tuple[int, int | None] | None:
        counted = _COUNT.match(self._pattern, self._at)
        if self._take("*"):
            count: tuple[int, int | None] = (0, None)
        elif self._take("+"):
            count = (1, None)
        elif self._take("?"):
            count = (0, 1)
        elif counted is not None:
            self._at = counted.end()
            low, comma, high = counted.groups()
            count = (int(low), int(high) if high else None if comma else int(low))
        else:
            return None
        if self._take("?"):  # lazy: the same texts
            return count
        if self._peek() == "+":
            raise self._refused("A possessive repeat")
        return count

    def _repeated(self, parts: _Parts, repeats: int, low: int, high: int | None) -> tuple[_Parts, int]:
        if high is not None and high < low:
            raise self._invalid("a repeat whose second number is smaller than its first")
        repeats *= max(low, high or 0, 1)
        if repeats > MAX_REPEATS:
            raise InvalidValue(f"The expression repeats a part {repeats} times; the limit is {MAX_REPEATS}.")
        if any(part.at_start or part.at_end or part.looks for part in parts):
            if (low, high) != (0, 1) or any(part.looks for part in parts):
                raise self._refused("A repeated anchor or lookahead")
            return _merged([*parts, _EMPTY]), repeats
        part = _joined(parts)
        if part.is_empty:
            return (part,), repeats
        count = f"{{{low},{'' if high is None else high}}}"
        least = "" if low == 0 else part.text if low == 1 else f"(?:{part.text}){{{low}}}"
        term = (f"(?:{part.text}){count}", least)
        return (_Part((term,), may_be_empty=low == 0 or part.may_be_empty),), repeats

    def _atom(self) -> tuple[_Parts, int]:
        if self._peek() in ("*", "+", "?"):
            raise self._invalid("nothing to repeat")
        if self._take("("):
            return self._group()
        if self._take("^"):
            return (_Part((), at_start=True, is_empty=True, may_be_empty=True),), 1
        if self._take("$"):
            return (_Part((), at_end=True, is_empty=True, may_be_empty=True),), 1
        if self._take("."):
            return (_Part.of(_DOT),), 1
        if self._take("["):
            return (_Part.of(self._class()),), 1
        if self._take("\\"):
            return (_Part.of(self._escape()),), 1
        char = self._peek()
        self._at += 1
        return (_Part.of(literal(char)),), 1

    def _group(self) -> tuple[_Parts, int]:
        if not self._take("?"):
            return self._closed_group()
        if self._take(":"):
            return self._closed_group()
        if (named := _GROUP_NAME.match(self._pattern, self._at)) is not None:
            self._at = named.end()
            return self._closed_group()
        for mark, name in sorted(_LOOKS.items(), key=lambda look: -len(look[0])):
            if self._take(mark):
                return (self._look(mark, name),), 1
        raise self._refused("A group that starts with (?" + self._peek())

    def _closed_group(self) -> tuple[_Parts, int]:
        parts, repeats = self._alternatives()
        if not self._take(")"):
            raise self._invalid("a ( without )")
        if not any(part.at_start or part.at_end or part.looks for part in parts):
            parts = (_joined(parts),)
        return parts, repeats

    def _look(self, mark: str, name: str) -> _Part:
        """Return a look-ahead as a demand on the whole text, if its place is the start of the text."""
        start = self._at
        parts, _ = self._closed_group()
        if mark == "=" and not any(part.looks for part in parts):
            bare = tuple(_Part(part.terms, True, part.at_end) for part in parts)
            return _Part((), is_empty=True, may_be_empty=True, looks=_whole(bare, ANY + "*"))
        body = self._pattern[start : self._at - 1].removeprefix("^")
        only = re.fullmatch(r"(\[(?:[^\]\\]|\\.)+\]|\\[dDwWsS])\*\$", body) if mark == "!" else None
        if mark == "!" and body == "$":
            return _Part((), is_empty=True, may_be_empty=True, looks=(f"(?:{ANY}+)",))
        if only is None:
            self._at = start
            raise self._refused(f"A {name}")
        kept = only[1][1:-1] if only[1].startswith("[") else only[1]
        other = f"[{kept[1:]}]" if kept.startswith("^") else f"[^{kept}]"
        (needed,) = search_patterns(other)
        return _Part((), is_empty=True, may_be_empty=True, looks=(needed,))

    def _class(self) -> str:
        negated = self._take("^")
        sets = _WIDE if negated else _NARROW
        items: list[str] = []
        while not self._take("]"):
            if not self._peek():
                raise self._invalid("a [ without ]")
            low = self._class_item(sets)
            if self._peek() == "-" and self._peek(2) not in ("-", "-]"):
                self._at += 1
                high = self._class_item(sets)
                if len(low) > 1 or len(high) > 1:
                    items += [_item(low), literal("-"), _item(high)]
                    continue
                if high < low:
                    raise self._invalid("a range whose end is before its start")
                items.append(f"{literal(low)}-{literal(high)}")
            else:
                items.append(_item(low))
        if not items:
            return ANY if negated else r"[^\s\S]"
        return f"[{'^' if negated else ''}{''.join(items)}]"

    def _class_item(self, sets: dict[str, str]) -> str:
        """Return a character, or the longer expression of a class."""
        if not self._take("\\"):
            char = self._peek()
            self._at += 1
            return self._whole_char(char)
        name = self._peek()
        if name in sets:
            self._at += 1
            return f"[{sets[name]}]"
        if self._take("b"):
            return "\b"
        if name in ("p", "P"):
            return self._property()
        return self._char_escape()

    def _escape(self) -> str:
        name = self._peek()
        if name in _NARROW:
            self._at += 1
            return f"[{_NARROW[name]}]"
        if name in ("b", "B"):
            raise self._refused("A word boundary")
        if name in ("p", "P"):
            return self._property()
        if name == "k" or (name.isdigit() and name != "0"):
            raise self._refused("A reference to a group")
        return literal(self._char_escape())

    def _property(self) -> str:
        found = _PROPERTY.match(self._pattern, self._at + 1)
        if found is None:
            raise self._invalid("a property of Unicode is written \\p{…}")
        name = self._peek()
        self._at = found.end()
        return rf"\{name}{found[0]}"

    def _char_escape(self) -> str:
        """Return the character of an escape; the backslash is taken."""
        name = self._peek()
        self._at += 1
        if name in _CONTROLS and not (name == "0" and self._peek().isdigit()):
            return _CONTROLS[name]
        if name == "c" and self._peek().isascii() and self._peek().isalpha():
            self._at += 1
            return chr(ord(self._pattern[self._at - 1].upper()) - 64)
        if name == "x":
            return self._hex(2)
        if name == "u":
            return self._unicode()
        if not name or (name.isalnum() and name.isascii()):
            self._at -= 1
            raise self._invalid(f"\\{name} is no escape")
        return self._whole_char(name)

    def _unicode(self) -> str:
        if (braced := re.compile(r"\{([0-9A-Fa-f]{1,6})\}").match(self._pattern, self._at)) is not None:
            self._at = braced.end()
            code = int(braced[1], 16)
            if code > 0x10FFFF:
                raise self._invalid("there is no such character")
            return self._whole_char(chr(code))
        char = self._hex(4, surrogates=True)
        if "\ud800" <= char <= "\udbff" and self._take("\\u"):
            low = self._hex(4, surrogates=True)
            if "\udc00" <= low <= "\udfff":
                return (char + low).encode("utf-16", "surrogatepass").decode("utf-16")
        return self._whole_char(char)

    def _hex(self, digits: int, *, surrogates: bool = False) -> str:
        text = self._peek(digits)
        if not re.fullmatch(f"[0-9A-Fa-f]{{{digits}}}", text):
            raise self._invalid(f"an escape of a character has {digits} hexadecimal digits")
        self._at += digits
        return chr(int(text, 16)) if surrogates else self._whole_char(chr(int(text, 16)))

    def _whole_char(self, char: str) -> str:
        if "\ud800" <= char <= "\udfff":
            raise self._refused("Half of a surrogate pair", r"write characters as \u{…}")
        return char


def _item(item: str) -> str:
    """Return an item of a class: a character, escaped, or a class."""
    return literal(item) if len(item) == 1 else item


def _merged(parts: list[_Part]) -> _Parts:
    """Return alternatives, those with the same anchors as one."""
    kinds: dict[tuple[bool, bool, tuple[str, ...]], list[_Part]] = {}
    for part in parts:
        kinds.setdefault((part.at_start, part.at_end, part.looks), []).append(part)
    return tuple(_merge(key, group) for key, group in kinds.items())


def _merge(key: tuple[bool, bool, tuple[str, ...]], group: list[_Part]) -> _Part:
    if len(group) == 1:
        return group[0]
    text = f"(?:{'|'.join(part.text for part in group)})"
    empty = all(part.is_empty for part in group)
    return _Part(
        () if empty else ((text, text),), key[0], key[1], empty, any(part.may_be_empty for part in group), key[2]
    )
