"""Budgets of jobs, the time that they were paused, and their pilots."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("budget_tokens", sa.BigInteger()))
    op.add_column("jobs", sa.Column("budget_s", sa.Double()))
    op.add_column("jobs", sa.Column("paused_s", sa.Double(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("pilot_only", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "pilot_requests",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("request_index", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_pilot_requests_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "request_index", name=op.f("pk_pilot_requests")),
    )


def downgrade() -> None:
    op.drop_table("pilot_requests")
    for column in ("pilot_only", "paused_s", "budget_s", "budget_tokens"):
        op.drop_column("jobs", column)
