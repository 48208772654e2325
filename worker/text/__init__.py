"""Token ids to text and back."""

from __future__ import annotations
