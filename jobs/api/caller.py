"""Who is calling: the owner of what a request makes, and the limit of what it sees.

routes -> [caller].  One dependency for all routes, so that no route can forget whose rows it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    key_id: str = ""  # what its jobs and files are recorded under; '' where no keys are in use
    sees_all: bool = True

    @property
    def sees(self) -> str | None:
        """The only owner whose rows it may read; None: every owner's."""
        return None if self.sees_all else self.key_id


def _caller() -> Caller:
    return Caller()


CallerNow = Annotated[Caller, Depends(_caller)]
