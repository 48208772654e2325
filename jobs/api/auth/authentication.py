"""Authentication: check the API key of every `/v1` request before its body is read.

Until the first key is created, every caller is accepted; the server then listens on loopback only. Keys are looked up
in the database on each request, so a revocation takes effect at once.
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
from starlette.types import Scope as HttpScope

from jobs.api import errors
from jobs.api.auth.caller import Caller, set_caller
from jobs.api.auth.revocation import RevocationMonitor
from jobs.errors import BasicError, InvalidKey, LimitReached, NotPermitted
from jobs.keys import Scope, check_key_on, same_key
from storage import keys
from storage.keys import KeyView
from storage.session import DATABASE_UNAVAILABLE, Database

_PREFIX = "/v1"
_READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_MAX_WRONG_KEYS = 60  # per minute and client address
_MINUTE_S = 60.0
_MAX_TRACKED = 10_000  # names that a rate limiter remembers

Prefetch = Callable[[HttpScope, Caller, Connection], None]


class Authenticator:
    """Checks API keys and their request rates. Its only state is the calls of the last minute."""

    def __init__(self, database: Database, *, local_key: str = "", keyless: bool = True) -> None:
        """Accept `local_key` besides the keys of the database; with `keyless` accept all until a key is created."""
        self._database = database
        self._local_key = local_key
        self._keyless = keyless
        self._calls = RateLimiter()
        self._wrong_keys = RateLimiter()

    def authenticate(
        self, authorization: str, address: str, needed: Scope, then: Callable[[Caller, Connection], None] | None = None
    ) -> Caller:
        """Return the caller; raise CallerRefused.

        A valid key is accepted however many invalid ones came from its address. `then` is called with the caller and
        the connection that looked up the key, to save a second connection.
        """
        with self._database.connect() as connection:
            caller = self._caller(connection, _bearer(authorization), address, needed)
            if then is not None:
                then(caller, connection)
        return caller

    def _caller(self, connection: Connection, presented: str, address: str, needed: Scope) -> Caller:
        if same_key(presented, self._local_key):
            return Caller()
        key = check_key_on(connection, presented)
        if key is not None:
            return self._check_key(key, needed)
        if not self._keys_in_use(connection):
            return Caller()
        wait_s = self._wrong_keys.hit(address, _MAX_WRONG_KEYS)
        if wait_s:
            raise LimitReached("Too many requests without a valid API key.", retry_after_s=wait_s)
        raise InvalidKey

    def is_still_valid(self, key: str, caller: Caller, session: Session) -> bool:
        """Return whether the caller of `key` ('': no key) would be accepted now. Does not count as a request."""
        if caller.key_id:
            return caller.key_id in keys.valid_keys(session, {caller.key_id})
        return same_key(key, self._local_key) or (self._keyless and not keys.keys_in_use(session))

    def _check_key(self, key: KeyView, needed: Scope) -> Caller:
        """Check the scope and the rate of a valid key."""
        sees_all = Scope.ADMIN in key.scopes
        if not sees_all and needed not in key.scopes:
            raise NotPermitted(f"This request needs the scope {needed}; the key has {', '.join(key.scopes)}.")
        limit = key.max_requests_per_minute
        wait_s = 0.0 if limit is None else self._calls.hit(key.id, limit)
        if wait_s:
            raise LimitReached(f"The limit of this key is {limit} requests per minute.", retry_after_s=wait_s)
        return Caller(key.id, sees_all=sees_all)

    def _keys_in_use(self, connection: Connection) -> bool:
        """Ask the database until a key exists, then remember it: keyless mode never comes back."""
        if self._keyless:
            self._keyless = not keys.keys_in_use(connection)
        return not self._keyless


class RateLimiter:
    """Limits events per name to a number per sliding minute. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._times: dict[str, deque[float]] = {}  # the least recently used name first

    def hit(self, name: str, limit: int) -> float:
        """Count an event and return 0; over `limit`, count nothing and return the seconds to wait."""
        now = self._now()
        with self._lock:
            times = self._times[name] = self._times.pop(name, deque())
            while len(self._times) > _MAX_TRACKED:  # bounds memory under requests from very many addresses
                del self._times[next(iter(self._times))]
            while times and times[0] <= now - _MINUTE_S:
                times.popleft()
            if len(times) >= limit:
                return times[0] + _MINUTE_S - now if times else _MINUTE_S
            times.append(now)
        return 0.0


class AuthMiddleware:
    """Authenticates every request below `/v1`, and closes its response when its key is revoked."""

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator,
        revocations: RevocationMonitor,
        prefetch: Prefetch | None = None,
    ) -> None:
        """Run `prefetch` in the thread and connection of the key lookup: a second thread hop costs more than it."""
        self._app = app
        self._authenticator = authenticator
        self._revocations = revocations
        self._prefetch = prefetch

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        """Pass an accepted request on with its caller; answer a refused one."""
        if scope["type"] != "http" or not _needs_key(scope["path"]):
            await self._app(scope, receive, send)
            return
        needed = Scope.READ if scope["method"] in _READ_METHODS else Scope.SUBMIT
        address = scope["client"][0] if scope.get("client") else ""
        authorization = Headers(scope=scope).get("authorization", "")
        try:
            caller = await run_in_threadpool(self._authenticate, scope, authorization, address, needed)
        except BasicError as refused:
            await errors.reply(refused)(scope, receive, send)
        except DATABASE_UNAVAILABLE as error:
            await errors.database_unavailable(error)(scope, receive, send)
        else:
            await self._answer(scope, receive, send, caller)

    def _authenticate(self, scope: HttpScope, authorization: str, address: str, needed: Scope) -> Caller:
        def then(caller: Caller, connection: Connection) -> None:
            set_caller(scope, caller)
            if self._prefetch is not None:
                self._prefetch(scope, caller, connection)

        return self._authenticator.authenticate(authorization, address, needed, then)

    async def _answer(self, scope: HttpScope, receive: Receive, send: Send, caller: Caller) -> None:
        if not caller.key_id:
            await self._app(scope, receive, send)
            return
        with self._revocations.watch(caller.key_id, send) as watched:
            await self._app(scope, receive, watched)


def _needs_key(path: str) -> bool:
    return path == _PREFIX or path.startswith(f"{_PREFIX}/")


def _bearer(authorization: str) -> str:
    kind, _, key = authorization.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""
