"""Bodies of /v1/responses: translated into chats, and continued from stored responses."""

from __future__ import annotations
