"""HTTP below the routes: bodies, multipart forms, limits, host checks, the HTTP/1.1 protocol."""

from __future__ import annotations
