"""Commands that prove what the service has computed."""

from __future__ import annotations
