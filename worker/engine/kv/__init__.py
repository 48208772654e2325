"""KV: the store protocol, the dense store, slot allocation, and hidden states per KV entry."""

from __future__ import annotations
