"""OpenAI batch files: reading requests and writing output lines."""

from __future__ import annotations
