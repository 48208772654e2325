"""The history of the schema, as Alembic scripts. Alembic reads them as files; nobody imports them."""

from __future__ import annotations
