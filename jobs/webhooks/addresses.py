"""Which addresses webhooks may call: public ones over https, and the networks that BASIC_WEBHOOK_NETWORKS allows.

A host name is resolved when the connection is made, and the connection goes to the address that was checked: a name
that resolves to another address a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self
from urllib.parse import SplitResult, urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_MAX_URL_CHARS: Final = 2_048
_NAT64: Final = ip_network("64:ff9b::/96")
# Public addresses that answer to machines of one provider only: the metadata service of Azure.
_METADATA: Final = frozenset({ip_address("168.63.129.16")})


class AddressRefused(Exception):
    """A webhook may not call this URL or address; the message says why."""


@dataclass(frozen=True, slots=True)
class AddressRules:
    """The networks besides public addresses that webhooks may call, also over plain http."""

    networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, networks: str) -> Self:
        """Read networks such as `10.0.0.0/8, fd00::/8`; raise ValueError for one that is none."""
        return cls(tuple(ip_network(part.strip()) for part in networks.split(",") if part.strip()))

    def check_url(self, url: str) -> None:
        """Raise AddressRefused for a URL that may not be called. Resolves its host name."""
        parts = _parts(url)
        for address in resolve(parts.hostname or "", _port(parts)):
            self.check_address(address, parts.scheme)

    def check_address(self, address: Address, scheme: str) -> None:
        """Raise AddressRefused for an address that may not be called."""
        seen = _embedded(address)
        if any(seen in network for network in self.networks):
            return
        if not seen.is_global or seen.is_multicast or seen in _METADATA:
            raise AddressRefused(
                f"{address} is not a public address; BASIC_WEBHOOK_NETWORKS of the API server names private networks "
                "that webhooks may call"
            )
        if scheme != "https":
            raise AddressRefused("it must begin with https://; http:// may reach BASIC_WEBHOOK_NETWORKS only")


def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a host name or address, in the order to try; raise AddressRefused if it has none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise AddressRefused(f"{host[:80]} can't be resolved: {getattr(exc, 'strerror', None) or exc}") from exc
    return list(_unique(ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _port(parts)
    except ValueError as exc:
        raise AddressRefused(f"it is not a URL: {exc}") from exc
    if len(url) > _MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url:
        raise AddressRefused(f"it must be at most {_MAX_URL_CHARS} printable ASCII characters")
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise AddressRefused("it must begin with https:// and name a host")
    if "@" in parts.netloc:
        raise AddressRefused("it must hold no user name and password")
    return parts


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for (mapped, 6to4, Teredo, NAT64), else the address."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo is not None else address)


def _unique(addresses: Iterable[Address]) -> Iterable[Address]:
    return dict.fromkeys(addresses)
