"""Grammars: which tokens a sequence may emit next, and which it must."""

from __future__ import annotations
