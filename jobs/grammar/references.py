"""Find what `$ref` names in a JSON schema: a JSON pointer, an anchor or an `$id` of the same document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote

from jobs.errors import InvalidValue, UnsupportedParameter

_IDS: Final = ("$id", "id")
_ANCHORS: Final = ("$anchor", "$dynamicAnchor")
_MAX_STEPS: Final = 30_000  # of comparing and evaluating parts of one schema


class TooManySteps(InvalidValue):
    """The schema has too many alternatives and values to compare; make it smaller."""


class References:
    """The parts of one schema that references can name, and the steps that are left to work on it."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = 0
        self._base = _base(root)
        self._named: dict[str, Any] = {}  # by $id, or by # and the anchor
        for part in _objects(root):
            for name in _IDS:
                if isinstance(part.get(name), str) and part is not root:
                    self._named.setdefault(part[name].removesuffix("#") or "#", part)
            for name in _ANCHORS:
                if isinstance(part.get(name), str):
                    self._named.setdefault(f"#{part[name]}", part)

    def step(self) -> None:
        """Count a step; raise TooManySteps after too many."""
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise TooManySteps

    def find(self, reference: Any) -> Any:
        """Return the schema that a reference names; raise RequestRefused if it is not in the document."""
        if not isinstance(reference, str):
            raise InvalidValue("A reference is a string.")
        address, _, fragment = reference.partition("#")
        if reference in self._named:
            return self._named[reference]
        if address in self._named:
            return _at(self._named[address], fragment, reference)
        if address not in ("", self._base):
            raise UnsupportedParameter(
                f"The schema {reference[:100]!r} is not part of this one, and the service fetches none. "
                "Copy it into $defs."
            )
        if fragment and not fragment.startswith("/"):
            if f"#{fragment}" in self._named:
                return self._named[f"#{fragment}"]
            raise InvalidValue(f"No part of the schema has the anchor {fragment[:100]!r}.")
        return _at(self._root, fragment, reference)


def _at(schema: Any, pointer: str, reference: str) -> Any:
    """Return the part of a schema at a JSON pointer (RFC 6901) that is written as the fragment of an address."""
    found = schema
    for step in unquote(pointer).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isascii() and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        elif name == "" and found is schema:  # "#/" is often written for "#"
            continue
        else:
            raise InvalidValue(f"The schema has no part {reference[:100]!r}.")
    return found


def _base(root: Any) -> str:
    found = next((root[name] for name in _IDS if isinstance(root.get(name), str)), "") if isinstance(root, dict) else ""
    return str(found).removesuffix("#")


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects of a schema, outer ones first."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
