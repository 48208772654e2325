"""What a page works with: the services, and who looks at it, by a key or from this machine.

A session is a cookie for a key that was shown at log-in. Each question to the record asks for the key again, in the
same transaction: a key that is revoked reads nothing more.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from fastapi import Request
from sqlalchemy.orm import Session

from jobs.api.auth.caller import Caller
from jobs.api.auth.guard import Authenticator
from jobs.api.dependencies import Services
from jobs.errors import InvalidKey
from jobs.keys import Scope

T = TypeVar("T")

COOKIE: Final = "basic_session"
_MAX_SESSIONS: Final = 10_000


class Sessions:
    """Who is logged in, in the memory of this process: a restart logs everybody out."""

    def __init__(self, authenticator: Authenticator) -> None:
        """Check keys with `authenticator`."""
        self._authenticator = authenticator
        self._keys: dict[str, str] = {}  # session -> key

    def begin(self, key: str, address: str) -> str:
        """Return a new session for a key; raise CallerRefused."""
        self._authenticator.authenticate(f"Bearer {key}", address, Scope.READ)
        session = secrets.token_urlsafe(32)
        self._keys[session] = key
        while len(self._keys) > _MAX_SESSIONS:
            del self._keys[next(iter(self._keys))]
        return session

    def end(self, session: str) -> None:
        """Forget a session."""
        self._keys.pop(session, None)

    def authenticate(self, session: str, address: str, needed: Scope) -> Caller:
        """Return who looks; raise CallerRefused."""
        key = self._keys.get(session, "")
        return self._authenticator.authenticate(f"Bearer {key}" if key else "", address, needed)

    def is_still_valid(self, session: str, caller: Caller, record: Session) -> bool:
        """Return whether who was let in would be let in again: the key opens, and has not been logged out."""
        key = self._keys.get(session, "")
        return (not caller.key_id or bool(key)) and self._authenticator.is_still_valid(key, caller, record)

    def knows(self, session: str) -> bool:
        """Return whether somebody has logged in with this session."""
        return session in self._keys


@dataclass(frozen=True, slots=True)
class PageContext:
    """One look at the pages."""

    services: Services
    sessions: Sessions
    session: str
    address: str
    dark: bool | None  # None: as the system
    caller: Caller | None = None  # who was let in; None: nobody yet

    @classmethod
    def of(cls, request: Request, services: Services, sessions: Sessions) -> PageContext:
        """Return the context of a request."""
        address = request.client.host if request.client else ""
        dark = {"1": True, "0": False}.get(request.cookies.get("basic_dark", ""))
        return cls(services, sessions, request.cookies.get(COOKIE, ""), address, dark)

    @property
    def signed_in(self) -> bool:
        """True if there is something to log out of."""
        return self.sessions.knows(self.session)

    async def authenticate(self, needed: Scope = Scope.READ) -> Caller:
        """Return who looks; raise CallerRefused."""
        return await asyncio.to_thread(self.sessions.authenticate, self.session, self.address, needed)

    async def read(self, question: Callable[[Session], T]) -> T:
        """Ask the record, in a thread, for who was let in; raise CallerRefused if they would not be let in again."""
        return await asyncio.to_thread(self._read, question)

    def _read(self, question: Callable[[Session], T]) -> T:
        with self.services.database.read() as session:
            if self.caller is None or not self.sessions.is_still_valid(self.session, self.caller, session):
                raise InvalidKey
            return question(session)
