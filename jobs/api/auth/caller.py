"""Who is calling: the owner of what a request makes, and the limit of what it sees.

One dependency for all routes, so that no route can forget whose rows it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.types import Scope

from jobs.errors import InvalidKey

_PLACE = "basic.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    key_id: str = ""  # what its jobs and files are recorded under; '' where no keys are in use
    sees_all: bool = True

    @property
    def sees(self) -> str | None:
        """The only owner whose rows it may read; None: every owner's."""
        return None if self.sees_all else self.key_id


def note_caller(scope: Scope, caller: Caller) -> None:
    """Write down who was let in with this request."""
    scope[_PLACE] = caller


async def _caller(request: Request) -> Caller:
    """Return who was let in; a route that nobody guards has no caller, and must not ask for one."""
    if _PLACE not in request.scope:
        raise InvalidKey
    return cast(Caller, request.scope[_PLACE])


CallerNow = Annotated[Caller, Depends(_caller)]
