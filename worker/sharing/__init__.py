"""One device for several models, each served by a process of its own: turns, and shares of the memory."""

from __future__ import annotations
