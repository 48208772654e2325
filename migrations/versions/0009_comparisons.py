"""Speed-up checks: a sample of a job is decoded again, with and without drafts (`compare_plain`)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from storage.views import create_views

revision = "0009"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("compare_plain", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.add_column("jobs", sa.Column("comparing_until", sa.Double()))
    op.add_column("jobs", sa.Column("compared_at", sa.Double()))
    due = sa.text("compare_plain > 0 AND compared_at IS NULL")
    op.create_index("ix_jobs_compare_plain", "jobs", ["compare_plain"], sqlite_where=due, postgresql_where=due)
    op.create_table(
        "comparisons",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("request_index", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("drafted_ms", sa.Double()),
        sa.Column("plain_ms", sa.Double()),
        sa.Column("batch_sequences", sa.Double()),
        sa.Column("same_text", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "request_index"],
            ["requests.job_id", "requests.request_index"],
            name="fk_comparisons_requests",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "request_index", name="pk_comparisons"),
    )
    create_views(op.get_bind(), ["job_comparison"])


def downgrade() -> None:
    op.execute("DROP VIEW job_comparison")
    op.drop_table("comparisons")
    op.drop_index("ix_jobs_compare_plain", "jobs")
    for column in ("compared_at", "comparing_until", "compare_plain"):
        op.drop_column("jobs", column)
