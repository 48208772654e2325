"""Objects in the shapes of the OpenAI API, without an HTTP framework."""

from __future__ import annotations
