"""Who may come in: every call below `/v1` shows its key here, before its body is read and its route is found.

As long as no key was ever made, everybody may come who can reach the shim, and the server sees to it that this is
nobody outside this machine. What a key is worth is asked of the record each time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from sqlalchemy import Connection
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Call

from jobs.api import errors
from jobs.api.auth.caller import Caller, note_caller
from jobs.api.auth.revocation import Watch
from jobs.errors import BasicError, InvalidKey, LimitReached, NotPermitted
from jobs.keys import Scope, key_among, same_key
from storage import keys
from storage.keys import KeyView
from storage.session import DATABASE_AWAY, Database

_GUARDED = "/v1"
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_WRONG_KEYS = 60  # a minute and address, before the answer is to come back later
_MINUTE_S = 60.0
_MOST_NAMES = 10_000


class Door:
    """Lets callers in or not. All it remembers is how often somebody came within the last minute."""

    def __init__(self, database: Database, *, local_key: str = "", keyless: bool = True) -> None:
        """Let in whoever holds `local_key`; with `keyless` also everybody, as long as no key was ever made."""
        self._database = database
        self._local_key = local_key
        self._keyless = keyless
        self._calls = Counts()
        self._wrong = Counts()

    def admit(
        self, authorization: str, address: str, needed: Scope, then: Callable[[Caller, Connection], None] | None = None
    ) -> Caller:
        """Return the caller; raise CallerRefused. A right key is never kept out by wrong ones from its address.

        Whoever is let in is handed to `then`, with the connection on which the record was asked.
        """
        with self._database.look() as connection:
            caller = self._caller(connection, _bearer(authorization), address, needed)
            if then is not None:
                then(caller, connection)
        return caller

    def _caller(self, connection: Connection, presented: str, address: str, needed: Scope) -> Caller:
        if same_key(presented, self._local_key):
            return Caller()
        key = key_among(connection, presented)
        if key is not None:
            return self._holder(key, needed)
        if not self._keys_in_use(connection):
            return Caller()
        wait_s = self._wrong.add(address, _WRONG_KEYS)
        if wait_s:
            raise LimitReached("Too many calls without a key that opens.", retry_after_s=wait_s)
        raise InvalidKey

    def still_admits(self, key: str, caller: Caller, session: Session) -> bool:
        """Return whether who was let in with `key` ('': without) would be let in again; it is not counted as a call."""
        if caller.key_id:
            return caller.key_id in keys.opening(session, {caller.key_id})
        return same_key(key, self._local_key) or (self._keyless and not keys.keys_in_use(session))

    def _holder(self, key: KeyView, needed: Scope) -> Caller:
        sees_all = Scope.ADMIN in key.scopes
        if not sees_all and needed not in key.scopes:
            raise NotPermitted(f"This needs the scope {needed}; the key has {', '.join(key.scopes)}.")
        most = key.max_requests_per_minute
        wait_s = 0.0 if most is None else self._calls.add(key.id, most)
        if wait_s:
            raise LimitReached(f"This key may call {most} times a minute.", retry_after_s=wait_s)
        return Caller(key.id, sees_all=sees_all)

    def _keys_in_use(self, connection: Connection) -> bool:
        """Ask the record until there is a key; from then on there has always been one."""
        if self._keyless:
            self._keyless = not keys.keys_in_use(connection)
        return not self._keyless


class Counts:
    """How often each name came within the last minute. Safe to share between threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Start with nobody."""
        self._now = now
        self._lock = threading.Lock()
        self._times: dict[str, deque[float]] = {}

    def add(self, name: str, most: int) -> float:
        """Count a call and return 0; or, if there were `most` within a minute, the seconds until there is room."""
        now = self._now()
        with self._lock:
            times = self._times[name] = self._times.pop(name, deque())  # now behind all who came before
            while len(self._times) > _MOST_NAMES:  # somebody has very many addresses; who was away longest is forgotten
                del self._times[next(iter(self._times))]
            while times and times[0] <= now - _MINUTE_S:
                times.popleft()
            if len(times) >= most:
                return times[0] + _MINUTE_S - now if times else _MINUTE_S
            times.append(now)
        return 0.0


class AccessGuard:
    """Asks the door about every call below `/v1`, and answers itself where the door says no.

    Answers that last are watched: what was let in is cut off when its key is revoked.
    """

    def __init__(
        self, app: ASGIApp, door: Door, watch: Watch, ahead: Callable[[Call, Caller, Connection], None] | None = None
    ) -> None:
        """Let `ahead` read what the route will ask for, in the thread that is taken anyway: another one costs more."""
        self._app = app
        self._door = door
        self._watch = watch
        self._ahead = ahead

    async def __call__(self, scope: Call, receive: Receive, send: Send) -> None:
        """Pass on the calls that may come in, with their caller."""
        if scope["type"] != "http" or not _is_guarded(scope["path"]):
            await self._app(scope, receive, send)
            return
        needed = Scope.READ if scope["method"] in _READING else Scope.SUBMIT
        address = scope["client"][0] if scope.get("client") else ""
        authorization = Headers(scope=scope).get("authorization", "")
        try:
            caller = await run_in_threadpool(self._let_in, scope, authorization, address, needed)
        except BasicError as refused:
            await errors.reply(refused)(scope, receive, send)
        except DATABASE_AWAY as away:
            await errors.database_away(away)(scope, receive, send)
        else:
            await self._answer(scope, receive, send, caller)

    def _let_in(self, scope: Call, authorization: str, address: str, needed: Scope) -> Caller:
        def then(caller: Caller, connection: Connection) -> None:
            note_caller(scope, caller)
            if self._ahead is not None:
                self._ahead(scope, caller, connection)

        return self._door.admit(authorization, address, needed, then)

    async def _answer(self, scope: Call, receive: Receive, send: Send, caller: Caller) -> None:
        if not caller.key_id:
            await self._app(scope, receive, send)
            return
        with self._watch.over(caller.key_id, send) as watched:
            await self._app(scope, receive, watched)


def _is_guarded(path: str) -> bool:
    return path == _GUARDED or path.startswith(f"{_GUARDED}/")


def _bearer(authorization: str) -> str:
    kind, _, key = authorization.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""
