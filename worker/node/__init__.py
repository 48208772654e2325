"""The processes of a node: supervisor, replicas and tensor-parallel ranks."""

from __future__ import annotations
