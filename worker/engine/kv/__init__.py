"""Dense KV, its slots and hidden states."""

from __future__ import annotations
