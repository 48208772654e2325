"""Quarantine of suspects, deadlines of requests, body versions, lost workers, and leader election."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Server defaults: older workers keep running and do not write these columns.
_COLUMNS: dict[str, dict[str, tuple[sa.types.TypeEngine[Any], Any]]] = {
    "jobs": {"body_version": (sa.Integer(), sa.text("1"))},
    "requests": {
        "expires_at": (sa.Double(), None),
        "suspect_group": (sa.Text(), None),
        "proven": (sa.Boolean(), sa.false()),
        "lone_crashes": (sa.Integer(), sa.text("0")),
    },
    "workers": {"process": (sa.Text(), None), "lost_at": (sa.Double(), None)},
}
_PARTIAL_INDEXES = {
    "suspect_group": "suspect_group IS NOT NULL",
    "expires_at": "expires_at IS NOT NULL AND finished_at IS NULL",
}


def upgrade() -> None:
    for table, columns in _COLUMNS.items():
        for name, (kind, default) in columns.items():
            op.add_column(table, sa.Column(name, kind, server_default=default, nullable=default is None))
    for name, condition in _PARTIAL_INDEXES.items():
        where = sa.text(condition)
        op.create_index(f"ix_requests_{name}", "requests", [name], sqlite_where=where, postgresql_where=where)
    op.create_table(
        "elections",
        sa.Column("office", sa.Text(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("term_ends_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("office", name="pk_elections"),
    )


def downgrade() -> None:
    op.drop_table("elections")
    for name in _PARTIAL_INDEXES:
        op.drop_index(f"ix_requests_{name}", "requests")
    for table, columns in _COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
