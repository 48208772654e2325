"""HTTP plumbing below the routes: bodies, multipart, limits, the HTTP/1.1 protocol."""

from __future__ import annotations
