"""Priority classes of jobs.

Imports nothing: the client uses them without a database.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Priority(StrEnum):
    """Priority class of a job: requests of a higher class are claimed first. Interactive requests come before all."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """The class as a number, as `jobs.priority_class` stores it; higher comes first."""
        return _RANKS[self]


_RANKS: Final[Mapping[Priority, int]] = {Priority.HIGH: 1, Priority.NORMAL: 0, Priority.LOW: -1}


def priority_of(rank: int) -> Priority:
    """Return the class of a stored rank."""
    return next(priority for priority, number in _RANKS.items() if number == rank)
