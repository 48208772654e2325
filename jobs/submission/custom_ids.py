"""The ids of a job's requests: those that were given, and for the others ids that no request of the job was given.

An id is all by which a caller knows an answer, so two requests never have the same one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_MAX_TOLD_CHARS: Final = 1_024  # of an id that is refused
_UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")  # by a database


@dataclass(frozen=True, slots=True)
class GivenId:
    """The custom_id with which a request came."""

    text: str
    is_own: bool  # it is the request's own. Else it is bad, or of a line that can't be read: only its error goes by it


def recovered(custom_id: object) -> GivenId | None:
    """Return a bad id in a form in which its sender knows it again; None if it has none."""
    text = f"{custom_id}" if isinstance(custom_id, str | float) or _is_short_int(custom_id) else ""
    return GivenId(storable(text), is_own=False) if 1 <= len(text) <= _MAX_TOLD_CHARS else None


def storable(text: str) -> str:
    """Return a text without what not every database can hold."""
    return _UNSTORABLE.sub("\ufffd", text)


def default_id(index: int) -> str:
    """Return the id of a request that was given none."""
    return f"request-{index}"


class CustomIds:
    """Which ids the requests of one job were given. They are added in their order."""

    def __init__(self) -> None:
        """Start with none."""
        self._places: dict[str, str] = {}
        self._unsure: dict[int, str | None] = {}

    def add(self, index: int, place: str, given: GivenId | None) -> str | None:
        """Note the id of a request; return the place of the one that had it before, if there is one."""
        if given is None or not given.is_own:
            self._unsure[index] = None if given is None else given.text
            return None
        earlier = self._places.setdefault(given.text, place)
        return None if earlier == place else earlier

    def others(self) -> dict[int, str]:
        """Return the ids of all requests, by their index, that were given none which is is_own."""
        taken = set(self._places)
        ids: dict[int, str] = {}
        for index, text in self._unsure.items():
            if text is not None and text not in taken:
                taken.add(text)
                ids[index] = text
        for index in self._unsure.keys() - ids.keys():
            ids[index] = default_id(index)
            while ids[index] in taken:
                ids[index] += "-unnamed"
        return ids


def _is_short_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 256
