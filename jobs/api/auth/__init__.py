"""Authentication: API keys, callers and revocation."""

from __future__ import annotations
