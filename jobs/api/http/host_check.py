"""Reject requests with an unknown `Host` (DNS rebinding) and cross-site requests of browsers, before keys are checked.

Without API keys, any web page open in a browser on this machine could otherwise call the service. A page whose domain
was rebound to our address sends that domain as `Host`; a page that calls our address directly sends its own `Origin`
or `Sec-Fetch-Site: cross-site`. Programs send none of these and are not affected.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jobs.api import errors
from jobs.errors import CallerRefused, CrossSite, HostNotServed
from jobs.settings import JobsSettings

_NETLOC: Final = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@/\\\s]+))(?::[0-9]{1,5})?", re.IGNORECASE)
_DEFAULT_PORT: Final = re.compile(r":(?:80|443)$")
_OWN_SITE: Final = frozenset({"same-origin", "none"})  # none: typed into the address bar, or a bookmark
_ANY: Final = "*"
_CROSS_SITE: Final = (
    "Cross-site requests need an API key: send Authorization: Bearer KEY. If this is the service's own page behind a "
    "proxy, add its host to BASIC_API_NAMES (comma-separated) and restart the API server."
)


@dataclass(frozen=True, slots=True)
class ServedNames:
    """The host names and addresses that the service answers to."""

    named: frozenset[str]  # BASIC_API_NAMES: a name, with or without a port; `*.name`: its subdomains; `*`: all
    own: frozenset[str]  # the listen address; the hostname if not on loopback
    every_address: bool = False  # it listens on all: accept any IP address, which can't be rebound

    @classmethod
    def of(cls, settings: JobsSettings) -> Self:
        """Return the names of these settings; includes the machine's hostname unless it listens on loopback."""
        own = {settings.api_host.lower()}
        address = _address(settings.api_host)
        every = address is not None and address.is_unspecified
        if every or not (address.is_loopback if address else settings.api_host == "localhost"):
            own.add(socket.gethostname().lower())
        return cls(frozenset(settings.served_names), frozenset(own), every)

    def allow(self, netloc: str) -> bool:
        """Return whether a `Host` header is one of the names."""
        host = _host(netloc)
        if host is None:
            return False
        address = _address(host)
        if address is not None and (address.is_loopback or self.every_address):
            return True
        return host == "localhost" or host in self.own or host in self.named or self._named(host)

    def allow_origin(self, netloc: str) -> bool:
        """Return whether an `Origin` is a configured name: our own page behind a proxy that changes `Host`."""
        return _without_port(netloc) in self.named

    def _named(self, host: str) -> bool:
        return _ANY in self.named or any(
            _host(name) == host or (name[:2] == "*." and host.endswith(name[1:])) for name in self.named
        )


class HostCheckMiddleware:
    """Rejects requests with an unknown host, and cross-site requests without a key."""

    def __init__(self, app: ASGIApp, served_names: ServedNames | None) -> None:
        """Accept these host names; None: all, for applications that no browser can reach."""
        self._app = app
        self._served_names = served_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an accepted HTTP or WebSocket request on; answer a rejected one."""
        refused = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refused is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await errors.reply(refused)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": refused.code})

    def _refusal(self, scope: Scope) -> CallerRefused | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")  # browsers always send it
        if self._served_names is not None and host and not self._served_names.allow(host):
            return HostNotServed.by(host)
        if _has_bearer_key(headers) or not self._is_cross_site(headers, host) or _is_navigation(scope, headers):
            return None
        return CrossSite(_CROSS_SITE)

    def _is_cross_site(self, headers: Headers, host: str) -> bool:
        """Return whether the headers of a browser say that a page of another site sends the request."""
        site = headers.get("sec-fetch-site")
        if site is not None and site not in _OWN_SITE:
            return True
        origin = headers.get("origin")
        if origin is None or site == "same-origin":
            return False
        netloc = urlsplit(origin).netloc if origin.startswith(("http://", "https://")) else ""
        if netloc and _without_port(netloc) == _without_port(host):
            return False
        return not (netloc and self._served_names is not None and self._served_names.allow_origin(netloc))


def _has_bearer_key(headers: Headers) -> bool:
    """Return whether a key is sent. A page can't make a browser send this header to another site without permission."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and bool(key.strip())


def _is_navigation(scope: Scope, headers: Headers) -> bool:
    """Return whether a user follows a link: harmless, for the linking page can't read the response."""
    return (
        scope.get("method") == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _without_port(netloc: str) -> str:
    return _DEFAULT_PORT.sub("", netloc.lower())


def _host(netloc: str) -> str | None:
    """Return the name or address in a `Host` header; None if it is malformed."""
    found = _NETLOC.fullmatch(netloc)
    return None if found is None else (found["six"] or found["name"]).lower().rstrip(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
