"""Custom ids of a job's requests: those of the caller, and generated ones for the other requests.

Ids are unique within a job, because a caller assigns results to requests by their id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from storage.dialect import storable

_MAX_INVALID_CHARS: Final = 1_024  # of an invalid id that is returned with its error


@dataclass(frozen=True, slots=True)
class GivenId:
    """The custom_id of a request, as the caller gave it."""

    text: str
    is_own: bool  # False: invalid, or found in an unreadable line; then only the request's error uses it


def recovered(custom_id: object) -> GivenId | None:
    """Return an invalid id as text for its error message and row; None if it can't be shown as text."""
    text = f"{custom_id}" if isinstance(custom_id, str | float) or _is_short_int(custom_id) else ""
    return GivenId(storable(text), is_own=False) if 1 <= len(text) <= _MAX_INVALID_CHARS else None


def default_id(index: int) -> str:
    """Return the generated id of the request at this index."""
    return f"request-{index}"


class CustomIds:
    """Collects the ids of a job's requests, in order, and finds duplicates."""

    def __init__(self) -> None:
        self._locations: dict[str, str] = {}
        self._without_own: dict[int, str | None] = {}

    def add(self, index: int, location: str, given: GivenId | None) -> str | None:
        """Add the id of a request; return the location of an earlier request with the same id, if there is one."""
        if given is None or not given.is_own:
            self._without_own[index] = None if given is None else given.text
            return None
        earlier = self._locations.setdefault(given.text, location)
        return None if earlier == location else earlier

    def generated(self) -> dict[int, str]:
        """Return unique ids, by index, for all requests without a valid id of their own."""
        taken = set(self._locations)
        ids: dict[int, str] = {}
        for index, text in self._without_own.items():
            if text is not None and text not in taken:
                taken.add(text)
                ids[index] = text
        for index in self._without_own.keys() - ids.keys():
            ids[index] = default_id(index)
            while ids[index] in taken:
                ids[index] += "-unnamed"
        return ids


def _is_short_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 256
