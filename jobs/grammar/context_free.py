"""Read grammars in Lark, and in EBNF as llama.cpp and XGrammar write it (`root ::= …`), as grammars of llguidance.

What llguidance does not hold exactly, or not from the text alone, is refused: special tokens, options of rules, and
JSON schemas inside.
"""

from __future__ import annotations

import re
from typing import Any, Final

from llguidance.gbnf_to_lark import any_to_lark

from jobs.errors import InvalidValue, UnsupportedParameter

MAX_RULES: Final = 500
_MAX_DEPTH: Final = 50

# Texts, expressions and comments of a grammar: their content is not syntax.
_QUOTED: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?![/ *])(?:[^/\\\n]|\\.)+/[a-z]*|(?://|#)[^\n]*')
_QUOTED_EBNF: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|#[^\n]*')
_ESCAPED: Final = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([^uU]))", re.DOTALL)
_REFUSED: Final = {
    r"%json": "JSON schemas inside of a grammar can't be held; send the schema as response_format.",
    r"%(?!ignore|import|declare)\w+": "Only the directives %ignore and %import can be held.",
    r"<[^>\n]*>": "Special tokens can't be held; write their text in quotes.",
    r"\w\s*\[[^\]\n]*\]\s*:": "Options of rules (lazy, stop, suffix, max_tokens, temperature) can't be held.",
}


def lark(text: str) -> str:
    """Return a grammar in Lark; raise RequestRefused for what can't be held."""
    is_ebnf = "::=" in _QUOTED_EBNF.sub("", text)
    bare = (_QUOTED_EBNF if is_ebnf else _QUOTED).sub('""', text)
    _refuse_deep(bare)
    if is_ebnf:
        return _from_ebnf(text)
    for pattern, reason in _REFUSED.items():
        if (found := re.search(pattern, bare)) is not None:
            raise UnsupportedParameter(f"{found[0][:40]!r}: {reason}")
    _refuse_many(len(re.findall(r"^[ \t]*[?!]?\w[\w.-]*[ \t]*:", bare, re.MULTILINE)))
    return text


def _from_ebnf(text: str) -> str:
    _refuse_many(text.count("::="))
    try:
        return str(any_to_lark(_ESCAPED.sub(_char, text)))
    except UnsupportedParameter:
        raise
    except Exception as exc:  # the converter raises any kind for what it can't read
        raise InvalidValue(f"The grammar is not valid: {str(exc)[:300]}") from exc


def _char(escape: Any) -> str:
    """Return an escape that the converter reads right: of others with \\u it drops the leading zeros."""
    digits = escape[1] or escape[2]
    if digits is None:
        return str(escape[0])
    code = int(digits, 16)
    if code < 0x80:
        return f"\\x{code:02x}"
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise InvalidValue(f"There is no character {escape[0]}.")
    return chr(code)


def _refuse_deep(bare: str) -> None:
    depth = 0
    for char in bare:
        depth += (char in "([{") - (char in ")]}")
        if depth > _MAX_DEPTH:
            raise InvalidValue(f"The grammar has groups in more than {_MAX_DEPTH} levels.")


def _refuse_many(rules: int) -> None:
    if rules > MAX_RULES:
        raise InvalidValue(f"The grammar has {rules} rules; the limit is {MAX_RULES}.")
