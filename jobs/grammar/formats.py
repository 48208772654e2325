"""The formats of strings that a grammar holds, as expressions; those of JSON Schema, OpenAPI and pydantic.

Every text that an expression matches has the format. Internationalized formats are held in ASCII, and leap seconds are
left out, because checkers refuse them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jobs.errors import InvalidValue, UnsupportedParameter
from jobs.grammar.patterns import ANY, full_pattern

_MONTHS_31: Final = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
_MONTHS_30: Final = "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_FEBRUARY: Final = "02-(?:0[1-9]|1[0-9]|2[0-8])"
_YEAR: Final = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR: Final = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # RFC 3339, appendix C
)
_DATE: Final = f"(?:{_YEAR}-(?:{_MONTHS_31}|{_MONTHS_30}|{_FEBRUARY})|{_LEAP_YEAR}-02-29)"
_TIME: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4: Final = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_H16: Final = "[0-9A-Fa-f]{1,4}"
_LS32: Final = f"(?:{_H16}:{_H16}|{_IPV4})"
_IPV6: Final = (  # RFC 3986, section 3.2.2
    f"(?:(?:{_H16}:){{6}}{_LS32}|::(?:{_H16}:){{5}}{_LS32}|(?:{_H16})?::(?:{_H16}:){{4}}{_LS32}"
    f"|(?:(?:{_H16}:){{0,1}}{_H16})?::(?:{_H16}:){{3}}{_LS32}|(?:(?:{_H16}:){{0,2}}{_H16})?::(?:{_H16}:){{2}}{_LS32}"
    f"|(?:(?:{_H16}:){{0,3}}{_H16})?::{_H16}:{_LS32}|(?:(?:{_H16}:){{0,4}}{_H16})?::{_LS32}"
    f"|(?:(?:{_H16}:){{0,5}}{_H16})?::{_H16}|(?:(?:{_H16}:){{0,6}}{_H16})?::)"
)
_LABEL: Final = "[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
_HOSTNAME: Final = rf"{_LABEL}(?:\.{_LABEL})*"
_ATOM: Final = r"[0-9A-Za-z!#$%&'*+/=?^_`{|}~-]+"
_EMAIL: Final = rf"{_ATOM}(?:\.{_ATOM})*@{_HOSTNAME}"  # RFC 5321, section 4.1.2, without quoted parts
_PCHAR: Final = "(?:[0-9A-Za-z._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"
_AUTHORITY: Final = (
    "(?:(?:[0-9A-Za-z._~!$&'()*+,;=:-]|%[0-9A-Fa-f]{2})*@)?"
    rf"(?:\[{_IPV6}\]|(?:[0-9A-Za-z._~!$&'()*+,;=-]|%[0-9A-Fa-f]{{2}})*)(?::[0-9]{{0,5}})?"
)
_TAIL: Final = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_PATHS: Final = f"//{_AUTHORITY}(?:/{_PCHAR}*)*|/(?:{_PCHAR}+(?:/{_PCHAR}*)*)?"
_URI: Final = f"[A-Za-z][0-9A-Za-z+.-]*:(?:{_PATHS}|{_PCHAR}+(?:/{_PCHAR}*)*|){_TAIL}"  # RFC 3986, appendix A
_SEGMENT: Final = "(?:[0-9A-Za-z._~!$&'()*+,;=@-]|%[0-9A-Fa-f]{2})+"  # without a colon
_URI_REFERENCE: Final = f"(?:{_URI}|(?:{_PATHS}|{_SEGMENT}(?:/{_PCHAR}*)*|){_TAIL})"
_VARIABLE: Final = "(?:[0-9A-Za-z_]|%[0-9A-Fa-f]{2})+(?:\\.(?:[0-9A-Za-z_]|%[0-9A-Fa-f]{2})+)*(?::[1-9][0-9]{0,3}|\\*)?"
_URI_TEMPLATE: Final = (  # RFC 6570, section 2, in ASCII
    rf"(?:[0-9A-Za-z!#$&()*+,./:;=?@\[\]_~-]|%[0-9A-Fa-f]{{2}}|\{{[+#./;?&]?{_VARIABLE}(?:,{_VARIABLE})*\}})*"
)
_TIMES: Final = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DAYS: Final = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_DURATION: Final = f"P(?:{_DAYS}(?:{_TIMES})?|{_TIMES}|[0-9]+W)"  # RFC 3339, appendix A
_POINTER: Final = "(?:/(?:[^/~]|~[01])*)*"  # RFC 6901
_BASE64: Final = "(?:[0-9A-Za-z+/]{4})*(?:[0-9A-Za-z+/]{2}==|[0-9A-Za-z+/]{3}=)?"
_HEX: Final = "[0-9A-Fa-f]"
_UUID: Final = "{0}{{8}}-{0}{{4}}-{1}{0}{{3}}-{0}{{4}}-{0}{{12}}"

PATTERNS: Final[dict[str, str]] = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "time": _TIME,
    "duration": _DURATION,
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOSTNAME,
    "idn-hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ip-address": _IPV4,  # draft 3
    "ipv6": _IPV6,
    "uri": _URI,
    "url": _URI,
    "iri": _URI,
    "uri-reference": _URI_REFERENCE,
    "iri-reference": _URI_REFERENCE,
    "uri-template": _URI_TEMPLATE,
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "uuid": _UUID.format(_HEX, _HEX),
    **{f"uuid{version}": _UUID.format(_HEX, version) for version in range(1, 9)},
    "byte": _BASE64,
    "base64": _BASE64,
}

MAX_LENGTHS: Final[dict[str, int]] = {"hostname": 253, "idn-hostname": 253}

# Bounds of the formats of integers; numbers of the others have none.
INTEGERS: Final[dict[str, tuple[int, int]]] = {
    "int8": (-(2**7), 2**7 - 1),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint8": (0, 2**8 - 1),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}

# Formats that say what a value is for, and allow any.
WITHOUT_FORM: Final = frozenset(
    {"binary", "directory-path", "double", "file-path", "float", "html", "markdown", "multiline", "password", "path"}
    | {"string", "text", "textarea"}
)

_NUMERIC: Final = ("integer", "number")


def format_patterns(name: Any, schema: Mapping[str, Any]) -> list[str]:
    """Return the expressions that a text of this format must match. Raise RequestRefused for an unknown one."""
    if not isinstance(name, str):
        raise InvalidValue("must be a string", param="format")
    types = schema.get("type", "string")
    types = types if isinstance(types, list) else [types]
    if name in WITHOUT_FORM or (name in INTEGERS and "integer" in types):
        return []
    if name in PATTERNS:
        longest = MAX_LENGTHS.get(name)
        return [full_pattern(PATTERNS[name]), *([] if longest is None else [f"{ANY}{{1,{longest}}}"])]
    if not {"string", *_NUMERIC} & set(types):
        return []  # formats are for strings and numbers
    raise UnsupportedParameter(
        f"The format {name[:40]!r} can't be held. Leave it out, and say with a pattern what the text looks like.",
        param="format",
    )
