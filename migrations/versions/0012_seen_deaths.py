"""Only observed crashes count against a request, and crashes on one bad host do not fail it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# Server defaults: older workers keep running and do not write these columns.
_COLUMNS: dict[str, dict[str, tuple[sa.types.TypeEngine[Any], Any]]] = {
    "jobs": {"comparing_by": (sa.Text(), None)},
    "requests": {"lone_served": (sa.Boolean(), sa.false()), "lone_host": (sa.Text(), None)},
}


def upgrade() -> None:
    for table, columns in _COLUMNS.items():
        for name, (kind, default) in columns.items():
            op.add_column(table, sa.Column(name, kind, server_default=default, nullable=default is None))
    op.create_table(
        "served",
        sa.Column("worker_id", sa.Text(), primary_key=True),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("last_at", sa.Double(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("served")
    for table, columns in _COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
