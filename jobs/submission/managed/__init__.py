"""Name, labels, priority and concurrency limit of a job: what callers manage it by."""

from __future__ import annotations
