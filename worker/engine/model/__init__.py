"""The packed language model: loading and its checks, backend, attention, offload."""

from __future__ import annotations
