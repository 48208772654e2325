"""Submissions: parse and validate requests, create jobs."""

from __future__ import annotations
