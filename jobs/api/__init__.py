"""The REST shim: HTTP in front of intake, partials and the record. Every reply and every error in OpenAI's shapes."""

from __future__ import annotations
