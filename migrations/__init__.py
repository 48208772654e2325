"""Schema migrations, as Alembic scripts. Alembic loads them as files."""

from __future__ import annotations
