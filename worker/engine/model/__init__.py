"""The packed language model: loading, attention dispatch, offload."""

from __future__ import annotations
