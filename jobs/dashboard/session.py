"""Sessions of the dashboard, and the context of a page: services, caller and session.

A session is a cookie that stands for the API key of a log-in. Every database read checks the key in the same
transaction, so a revoked key reads nothing more.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from fastapi import Request
from sqlalchemy.orm import Session

from jobs.api.auth.authentication import Authenticator
from jobs.api.auth.caller import Caller
from jobs.api.dependencies import Services
from jobs.errors import InvalidKey, NotPermitted
from jobs.keys import Scope

T = TypeVar("T")

BASE: Final = "/dashboard"  # path prefix of all pages
SUBMIT_PATH: Final = f"{BASE}/submit"  # takes a file as `POST /v1/jobs` takes JSON lines
COOKIE: Final = "basic_session"
_MAX_SESSIONS: Final = 10_000


class Sessions:
    """Open sessions, in the memory of this process: a restart logs everyone out."""

    def __init__(self, authenticator: Authenticator) -> None:
        """Check keys with `authenticator`."""
        self._authenticator = authenticator
        self._keys: dict[str, str] = {}  # session -> key

    def begin(self, key: str, address: str) -> str:
        """Return a new session for a key; raise CallerRefused if the key may not read."""
        self._authenticator.authenticate(f"Bearer {key}", address, Scope.READ)
        session = secrets.token_urlsafe(32)
        self._keys[session] = key
        while len(self._keys) > _MAX_SESSIONS:
            del self._keys[next(iter(self._keys))]
        return session

    def end(self, session: str) -> None:
        """Forget a session: its cookie no longer stands for a key."""
        self._keys.pop(session, None)

    def authenticate(self, session: str, address: str, needed: Scope) -> Caller:
        """Return the caller of a session; raise CallerRefused."""
        key = self._keys.get(session, "")
        return self._authenticator.authenticate(f"Bearer {key}" if key else "", address, needed)

    def is_still_valid(self, session: str, caller: Caller, database_session: Session) -> bool:
        """Return whether the caller's key is still valid and not logged out."""
        key = self._keys.get(session, "")
        return (not caller.key_id or bool(key)) and self._authenticator.is_still_valid(key, caller, database_session)

    def knows(self, session: str) -> bool:
        """Return whether this session is open."""
        return session in self._keys


@dataclass(frozen=True, slots=True)
class PageContext:
    """What an open page needs: services, session and caller."""

    services: Services
    sessions: Sessions
    session: str
    address: str
    dark: bool | None  # None: the system's setting
    caller: Caller | None = None  # None: not authenticated yet

    @classmethod
    def of(cls, request: Request, services: Services, sessions: Sessions) -> PageContext:
        """Return the context of a request."""
        address = request.client.host if request.client else ""
        dark = {"1": True, "0": False}.get(request.cookies.get("basic_dark", ""))
        return cls(services, sessions, request.cookies.get(COOKIE, ""), address, dark)

    @property
    def signed_in(self) -> bool:
        """True if the caller has logged in with a key."""
        return self.sessions.knows(self.session)

    @property
    def is_admin(self) -> bool:
        """True if the caller sees the jobs of all keys."""
        return self.caller is not None and self.caller.sees_all

    async def authenticate(self, needed: Scope = Scope.READ) -> Caller:
        """Return the caller; raise CallerRefused if it lacks the scope."""
        return await asyncio.to_thread(self.sessions.authenticate, self.session, self.address, needed)

    async def may(self, scope: Scope) -> bool:
        """Return whether the caller's key has a scope. Each action checks it again."""
        try:
            await self.authenticate(scope)
        except NotPermitted:
            return False
        return True

    async def read(self, query: Callable[[Session], T]) -> T:
        """Run a query in a thread; raise CallerRefused if the session is no longer valid."""
        return await asyncio.to_thread(self._read, query)

    def _read(self, query: Callable[[Session], T]) -> T:
        with self.services.database.read() as session:
            if self.caller is None or not self.sessions.is_still_valid(self.session, self.caller, session):
                raise InvalidKey
            return query(session)
