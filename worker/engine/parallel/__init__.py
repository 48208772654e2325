"""Tensor parallelism: leader, commands and their channel."""

from __future__ import annotations
