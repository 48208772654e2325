"""Commands that find and manage jobs."""

from __future__ import annotations
