"""Sign JSON objects with the Ed25519 key of the installation, and check such signatures.

What is signed is the object without its field `signature`, as canonical JSON: sorted keys, no white space, UTF-8.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobs.errors import SetupError
from jobs.local.private_files import create_private

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM: Final = "Ed25519"
_FIELD: Final = "signature"
_MISSING: Final = "Signatures need the package cryptography; install it with: pip install 'basic-batch[proof]'"


class SignatureInvalid(Exception):
    """The object is not signed, or not as it is now."""


def signed(value: Mapping[str, Any], source: Path | str) -> dict[str, Any]:
    """Return an object with its signature by a private key: PEM, or a file of it, which is created if it is missing."""
    key = _key(source)
    signature = {
        "algorithm": ALGORITHM,
        "public_key": _text(key.public_key().public_bytes_raw()),
        "value": _text(key.sign(_canonical(value))),
    }
    return {**value, _FIELD: signature}


def check_signature(value: Mapping[str, Any], public_key: str | None = None) -> str:
    """Return the public key that has signed an object. Raises SignatureInvalid, also if it is not `public_key`."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ModuleNotFoundError as exc:
        raise SetupError(_MISSING) from exc
    signature = value.get(_FIELD)
    if not isinstance(signature, dict) or signature.get("algorithm") != ALGORITHM:
        raise SignatureInvalid(f"it has no {ALGORITHM} signature")
    own = str(signature.get("public_key"))
    if public_key is not None and own != public_key:
        raise SignatureInvalid(f"it is signed by another key: {own}")
    try:
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(own, validate=True))
        key.verify(base64.b64decode(str(signature.get("value")), validate=True), _canonical(value))
    except (ValueError, InvalidSignature) as exc:
        raise SignatureInvalid("the signature does not match: it was changed after it was signed") from exc
    return own


def public_key_of(source: Path | str) -> str:
    """Return the public part of a private key, as `signed` takes it."""
    return _text(_key(source).public_key().public_bytes_raw())


def _key(source: Path | str) -> Ed25519PrivateKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ModuleNotFoundError as exc:
        raise SetupError(_MISSING) from exc
    name = "BASIC_SIGNING_KEY" if isinstance(source, str) else f"BASIC_SIGNING_KEY: {source}"
    try:
        if isinstance(source, Path) and not source.exists():
            key = Ed25519PrivateKey.generate()
            pem = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            source.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another process was first: its key is the key
                create_private(source, pem.decode())
        text = source if isinstance(source, str) else source.read_text()
        read = serialization.load_pem_private_key(text.encode(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise SetupError(f"{name} can't be used as a key: {exc}") from exc
    if not isinstance(read, Ed25519PrivateKey):
        raise SetupError(f"{name} is no {ALGORITHM} key; make one with: openssl genpkey -algorithm ed25519")
    return read


def _canonical(value: Mapping[str, Any]) -> bytes:
    unsigned = {name: part for name, part in value.items() if name != _FIELD}
    return json.dumps(unsigned, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
