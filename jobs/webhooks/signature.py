"""Sign events as Standard Webhooks does (https://www.standardwebhooks.com), which OpenAI's clients verify.

The signature is `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`; the key is the secret after `whsec_`,
decoded from base64. While an old secret is kept, there is a signature for each.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Final

_PREFIX: Final = "whsec_"
_SECRET_BYTES: Final = 32


def new_secret() -> str:
    """Return a new random secret."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def secret_hint(secret: str) -> str:
    """Return the start and the end of a secret, to recognise it by."""
    return f"{_PREFIX}…{secret[-4:]}"


def signed_headers(event_id: str, at: int, body: bytes, keys: Iterable[str]) -> dict[str, str]:
    """Return the headers of an event that is sent at a time (Unix seconds)."""
    signed = f"{event_id}.{at}.".encode() + body
    digests = [hmac.digest(base64.b64decode(key.removeprefix(_PREFIX)), signed, hashlib.sha256) for key in keys]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }
