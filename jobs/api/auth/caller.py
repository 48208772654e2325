"""The authenticated caller of a request: the owner of what it creates, and the limit of what it reads.

Routes get it from one dependency, so that none forgets to filter by owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request
from starlette.types import Scope

from jobs.errors import InvalidKey

_SCOPE_KEY = "basic.caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request."""

    key_id: str = ""  # the owner stored with its jobs and files; '' without a key
    sees_all: bool = True

    @property
    def sees(self) -> str | None:
        """The only owner whose rows the caller may read; None: all owners."""
        return None if self.sees_all else self.key_id


def set_caller(scope: Scope, caller: Caller) -> None:
    """Store the authenticated caller in the request's scope."""
    scope[_SCOPE_KEY] = caller


async def _caller(request: Request) -> Caller:
    """Return the caller; raise InvalidKey on a route that is not authenticated, where there is none."""
    if _SCOPE_KEY not in request.scope:
        raise InvalidKey
    return cast(Caller, request.scope[_SCOPE_KEY])


CurrentCaller = Annotated[Caller, Depends(_caller)]
