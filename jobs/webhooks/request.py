"""Send one event to one URL, in bounded time and memory, and only to an address that the rules allow.

Redirects are not followed, proxies of the environment are not used, and of the answer only its status and one line of
an error are kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import httpcore
import httpx

import jobs
from jobs.webhooks.addresses import AddressRefused, AddressRules, resolve
from jobs.webhooks.signature import signed_headers
from storage.webhooks import Attempt, EndpointView

_MAX_BODY_BYTES: Final = 2_048  # of an answer
_MAX_LINE_CHARS: Final = 200  # of an answer, kept as the error
_GONE: Final = 410  # Standard Webhooks: the endpoint wants no more attempts


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """An event: ids and status, no texts."""

    id: str
    type: str
    job_id: str  # id of the batch, job or response
    created_at: float

    def body(self) -> bytes:
        """Return the event as JSON, in OpenAI's shape; `status` is ours."""
        data = {"id": self.job_id, "status": self.type.partition(".")[2]}
        event = {"id": self.id, "object": "event", "created_at": int(self.created_at), "type": self.type, "data": data}
        return json.dumps(event, separators=(",", ":")).encode()


def send(event: WebhookEvent, to: EndpointView, rules: AddressRules, now: float, timeout_s: float) -> Attempt:
    """Send an event, signed at `now` (Unix seconds), and return how that ended. All of it takes at most `timeout_s`."""
    body = event.body()
    headers = {
        "content-type": "application/json",
        "user-agent": f"basic-batch/{jobs.__version__}",
        **signed_headers(event.id, int(now), body, to.secrets_at(now)),
    }
    backend = _CheckedNetwork(rules, to.url.partition(":")[0].lower(), time.monotonic() + timeout_s)
    try:
        with (
            httpcore.ConnectionPool(ssl_context=httpx.create_ssl_context(), network_backend=backend) as pool,
            pool.stream("POST", to.url, headers=list(headers.items()), content=body) as response,
        ):
            return _attempt(response.status, _head(response.iter_stream()))
    except AddressRefused as refused:
        return Attempt(None, _line(str(refused)), delivered=False)
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError, ValueError) as exc:
        return Attempt(None, _line(f"{type(exc).__name__}: {exc}".removesuffix(": ")), delivered=False)


def _attempt(status: int, text: str) -> Attempt:
    if 200 <= status < 300:
        return Attempt(status, None, delivered=True)
    if 300 <= status < 400:
        return Attempt(status, "Redirects are not followed: give the final URL.", delivered=False)
    return Attempt(status, _line(text) or None, delivered=False, final=status == _GONE)


def _head(chunks: Iterable[bytes]) -> str:
    """Return the start of a body; the rest is not read."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _MAX_BODY_BYTES:
            break
    return head[:_MAX_BODY_BYTES].decode(errors="replace")


def _line(text: str) -> str:
    """Return the first printable line of a text, cut."""
    words = "".join(letter if letter.isprintable() else " " for letter in text.strip().partition("\n")[0])
    return " ".join(words.split())[:_MAX_LINE_CHARS]


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connects to checked addresses only, and lets nothing last beyond a deadline."""

    def __init__(self, rules: AddressRules, scheme: str, ends_at: float) -> None:
        self._rules = rules
        self._scheme = scheme
        self._ends_at = ends_at
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to the first address of the host that answers; raise AddressRefused if any is not allowed."""
        addresses = resolve(host, port)
        for address in addresses:
            self._rules.check_address(address, self._scheme)
        *others, last = addresses
        for address in others:
            try:
                return self._connected(str(address), port)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return self._connected(str(last), port)

    def _connected(self, address: str, port: int) -> httpcore.NetworkStream:
        left_s = _left_s(self._ends_at, httpcore.ConnectTimeout)
        return _TimedStream(self._network.connect_tcp(str(ip_address(address)), port, left_s), self._ends_at)


class _TimedStream(httpcore.NetworkStream):
    """A stream whose reads and writes all end at one deadline: an endpoint that drips bytes gains no time."""

    def __init__(self, stream: httpcore.NetworkStream, ends_at: float) -> None:
        self._stream = stream
        self._ends_at = ends_at

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read what has arrived."""
        return self._stream.read(max_bytes, _left_s(self._ends_at, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write all bytes."""
        self._stream.write(buffer, _left_s(self._ends_at, httpcore.WriteTimeout))

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Continue over TLS; the certificate must be that of the host in the URL."""
        left_s = _left_s(self._ends_at, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left_s), self._ends_at)

    def get_extra_info(self, info: str) -> Any:
        """Return what the stream says about itself."""
        return self._stream.get_extra_info(info)


def _left_s(ends_at: float, late: type[httpcore.TimeoutException]) -> float:
    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise late("The endpoint did not answer in time.")
    return left_s
