"""Bounds of numbers and multiples, such that a reader who parses numbers as binary floats finds them kept too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.grammar.formats import INTEGERS

MAX_BOUND: Final = 10**15  # of a number; wider bounds are narrowed to it
MAX_INTEGER_BOUND: Final = 10**18
_MIN_STEP: Final = 1e-9  # smallest distance of an exclusive bound at 0
_EXACT: Final = 2**53  # integers up to it are exact as floats
_MAX_MULTIPLE: Final = 2**31
NAMES: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


def number_keywords(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bounds of numbers of a schema as inclusive `minimum` and `maximum`, and `multipleOf`.

    Raise RequestRefused, whose `param` is the keyword.
    """
    for name in NAMES:
        if name in schema and not is_number(schema[name]) and not _is_draft_4(name, schema[name]):
            raise InvalidValue("must be a number", param=name)
    types = schema.get("type")
    whole = types == "integer" or (isinstance(types, list) and "integer" in types and "number" not in types)
    low, high = _bound(schema, "minimum", whole, 1), _bound(schema, "maximum", whole, -1)
    bounds = INTEGERS.get(str(schema.get("format")))
    if whole and bounds is not None:
        least, most = bounds
        low = least if low is None else max(low, least)
        high = most if high is None else min(high, most)
    found: dict[str, Any] = {}
    if "multipleOf" in schema:
        found["multipleOf"] = _multiple(schema["multipleOf"])
        if not whole:  # a long number with a fraction would be rounded to another one
            low = -_EXACT if low is None else low
            high = _EXACT if high is None else high
    limit = MAX_INTEGER_BOUND if whole else MAX_BOUND
    if low is not None:
        found["minimum"] = _narrowed(max(low, -limit), "minimum", low, limit)
    if high is not None:
        found["maximum"] = _narrowed(min(high, limit), "maximum", high, limit)
    return found


def exact_number(value: float) -> float:
    """Return a number of `const` or `enum` in the form that a grammar can hold; raise InvalidValue if none can."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) > _EXACT:
        raise InvalidValue(f"{value} has more digits than a number of JSON keeps; write it as a string")
    if isinstance(value, float) and not 1e-15 <= abs(value) <= MAX_BOUND:
        raise InvalidValue(f"{value} is too small or too large for a fixed number; write it as a string")
    return value


def _bound(schema: Mapping[str, Any], name: str, whole: bool, step: int) -> float | None:
    """Return the inclusive bound of `minimum` (step 1) or `maximum` (step -1) and its exclusive form."""
    exclusive = schema.get("exclusive" + name.capitalize())
    inclusive: float | None = schema.get(name)
    if exclusive is True:  # draft 4: it makes the other one exclusive
        exclusive, inclusive = inclusive, None
    if exclusive is None or exclusive is False:
        return inclusive if inclusive is None else _integral(inclusive, step) if whole else inclusive
    inside = _inside(exclusive, whole, step)
    if inclusive is None:
        return inside
    return max(inclusive, inside) if step > 0 else min(inclusive, inside)


def _inside(bound: float, whole: bool, step: int) -> float:
    """Return the first number inside of an exclusive bound."""
    if whole:
        first = _integral(bound, step)
        return first + step if first == bound else first
    if bound == 0:
        return step * _MIN_STEP
    return math.nextafter(bound, step * math.inf)


def _integral(bound: float, step: int) -> int:
    return math.ceil(bound) if step > 0 else math.floor(bound)


def _narrowed(bound: float, name: str, asked: float, limit: int) -> float:
    """Return a bound in a form that the grammar holds; raise InvalidValue if it excludes what it narrows."""
    if (name == "minimum" and asked > limit) or (name == "maximum" and asked < -limit):
        raise UnsupportedParameter(f"A bound beyond ±{limit:.0e} can't be held; use a string.", param=name)
    return int(bound) if float(bound).is_integer() else bound


def _multiple(value: float) -> float:
    exact = Fraction(value)
    if exact <= 0:
        raise InvalidValue("must be above 0", param="multipleOf")
    if exact.denominator > 2**10 or exact.numerator * 1000 > _MAX_MULTIPLE:
        raise UnsupportedParameter(
            f"Readers who parse numbers as binary floats don't agree on multiples of {value}. Use an integer of a "
            "smaller unit, or a string with a pattern.",
            param="multipleOf",
        )
    return exact.numerator if exact.denominator == 1 else float(exact)


def is_number(value: Any) -> bool:
    """Return whether a value is a number of JSON."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_draft_4(name: str, value: Any) -> bool:
    return name.startswith("exclusive") and isinstance(value, bool)
