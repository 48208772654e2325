"""Parameters of a request and of a job: sampling, grammar, reasoning and tools."""

from __future__ import annotations
