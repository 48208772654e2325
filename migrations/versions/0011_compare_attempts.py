"""A speed-up check that crashes its workers fails, with an error for each of its requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from storage.views import create_views

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_ERROR = ("error_code", "error_message")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("compare_attempts", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.execute("DROP VIEW job_comparison")
    with op.batch_alter_table("comparisons") as table:  # SQLite can't drop NOT NULL: the table is recreated
        table.alter_column("same_text", existing_type=sa.Boolean(), nullable=True)
        for name in _ERROR:
            table.add_column(sa.Column(name, sa.Text()))
    create_views(op.get_bind(), ["job_comparison"])


def downgrade() -> None:
    op.execute("DROP VIEW job_comparison")
    op.execute("DELETE FROM comparisons WHERE error_code IS NOT NULL")
    with op.batch_alter_table("comparisons") as table:
        table.alter_column("same_text", existing_type=sa.Boolean(), nullable=False)
        for name in _ERROR:
            table.drop_column(name)
    create_views(op.get_bind(), ["job_comparison"])
    op.drop_column("jobs", "compare_attempts")
